"""The tests that need a GPU: `pytest -m gpu`, with the plugins and options that a bare machine has."""

import os
import re
import subprocess
import sys
from pathlib import Path

from setting import Bar, Figures

from skippipe.config.experiment import Experiment

REPOSITORY = Path(__file__).resolve().parents[2]
REHEARSE = "SKIPPIPE_GPU_TESTS_ON_CPU"
"""Runs the tests on the CPU."""


def experiments(folder: Path, *, rehearse: bool) -> list[Experiment]:
    """Return none: the tests bring their own."""
    return []


def measure(figures: Figures, folder: Path, carried: Path | None) -> None:
    """Run them; the log lies beside the results."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-ra", "-m", "gpu", "tests/gpu"]
    environment = os.environ | ({REHEARSE: "1"} if figures.rehearse else {})
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    summary = done.stdout.splitlines()[-1] if done.stdout else done.stderr[-200:]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", summary)}
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR", "SKIPPED")):
            figures.say(line)
    bad = counts.get("failed", 0) + counts.get("error", 0)
    figures.add("tests that passed", counts.get("passed", 0), "", Bar(at_least=1))
    figures.add("tests that failed", bad, "", Bar(at_most=0))
