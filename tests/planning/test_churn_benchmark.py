"""The benchmark of goodput: a row of it runs and is written down."""

import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).parents[2] / "benchmarks" / "churn" / "run.py"


@pytest.mark.extended
def test_a_row_of_the_benchmark_runs() -> None:
    result = subprocess.run(
        [sys.executable, str(COMMAND), "--quick", "--nodes", "18", "--only", "one in 60 s", "--only", "stages, 33%"],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == [
        "stages, 33% an hour, 18 nodes",
        "one in 60 s, 7 processes",
    ]
