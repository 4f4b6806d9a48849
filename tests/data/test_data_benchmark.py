"""The benchmark of much text: all of its rows run, and keep what is promised."""

import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).parents[2] / "benchmarks" / "data" / "run.py"


@pytest.mark.extended
def test_the_rows_of_the_benchmark_run() -> None:
    result = subprocess.run(
        [sys.executable, str(COMMAND), "--quick"], capture_output=True, text=True, timeout=170, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| yes |") == 6
    assert "different caches: 0" in result.stdout
    assert "of them with other tokens: 0" in result.stdout
