"""The benchmark of losses: all of its rows run, and none breaks a promise but that of time on a busy machine."""

import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).parents[2] / "benchmarks" / "membership" / "run.py"


@pytest.mark.extended
def test_the_rows_of_the_benchmark_run() -> None:
    result = subprocess.run(
        [sys.executable, str(COMMAND), "--quick"], capture_output=True, text=True, timeout=170, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("different epochs held: 0") == 2
    assert "false alarms: 0" in result.stdout
