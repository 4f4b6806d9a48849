"""The benchmark of the profile: a row runs, on a shaped line between two hosts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).parents[2] / "benchmarks" / "profile" / "run.py"
POSSIBLE = os.geteuid() == 0 and shutil.which("ip") is not None and Path("/dev/net/tun").exists()


@pytest.mark.extended
@pytest.mark.skipif(not POSSIBLE, reason="needs root, iproute2 and /dev/net/tun")
def test_a_row_of_the_benchmark_runs() -> None:
    result = subprocess.run(
        [sys.executable, str(COMMAND), "--quick", "--only", "20 Mbit/s, 40"],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "| 20 Mbit/s, 40 ms there and back |" in result.stdout
