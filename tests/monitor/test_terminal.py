"""What a person sees on a terminal of 80 columns."""

import fcntl
import logging
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import pytest

from skippipe.cli.safe_output import BarHandler
from skippipe.monitor.console import Console, step_line
from skippipe.monitor.metrics import Metric, StepMetrics
from skippipe.monitor.terminal import broken, columns, say

COLUMNS = 80
METRICS: StepMetrics = {
    Metric.STEP: 7,
    Metric.TRAIN_LOSS: 4.12351,
    Metric.GRADIENT_NORM: 2.1987,
    Metric.LEARNING_RATE: 6e-4,
    Metric.ITERATION_S: 12.5,
    Metric.PREDICTED_S: 11.25,
    Metric.TOKENS_PER_S: 13_719.2,
    Metric.MFU: 0.351,
}


@contextmanager
def a_terminal() -> Iterator[int]:
    """Make standard output and error a pseudo-terminal; give the side from which one reads what they show."""
    shown, written = pty.openpty()
    fcntl.ioctl(written, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    with os.fdopen(written, "w") as stream, redirect_stdout(stream), redirect_stderr(stream):
        yield shown
    os.close(shown)


def all_shown(terminal: int, last: str) -> str:
    """Return what the terminal shows up to its text `last`: the kernel hands it over in pieces, some of them late."""
    shown = ""
    while last not in shown:
        shown += os.read(terminal, 1 << 16).decode()
    return shown


@pytest.mark.parametrize("max_steps", [12, 10_000, 100_000])
def test_step_lines_fit_and_keep_what_matters(max_steps: int) -> None:
    for metrics in (METRICS, METRICS | {Metric.STEP: max_steps, Metric.VALIDATION_LOSS: 4.0286}):
        line = step_line(metrics, max_steps, COLUMNS)
        assert len(line) <= COLUMNS
        for wanted in ("step ", "loss 4.1235", "12.500 s (plan 11.250)"):
            assert wanted in line
    assert "validation loss 4.0286" in line
    assert step_line(METRICS, 12) == (
        "step 7/12   loss 4.1235  12.500 s (plan 11.250)  grad norm 2.20  lr 6.0e-04  13,719 tokens/s  MFU 35.1%"
    )


def test_nothing_is_glued_to_the_bar() -> None:
    with a_terminal() as terminal:
        console = Console(0, 10, interval=1)
        console.write(METRICS)
        BarHandler().emit(logging.makeLogRecord({"msg": "a warning"}))
        say("rank  node\n   0  all")
        say("word " * 30)
        console.close()
        say("the end")
        shown = all_shown(terminal, "the end\r\n")
    assert "13,719 tokens/s" in shown
    for text in ("step 7/10", "a warning", "rank  node", "word word"):
        # In front of it stands the start of the row, with nothing but spaces since the row was emptied.
        assert re.search(rf"(^|\n|\r *\r){re.escape(text)}", shown), (text, shown)
    rows = [re.sub(r".*\r", "", row) for row in shown.replace("\r\n", "\n").split("\n")]
    assert max(map(len, rows)) <= COLUMNS


def test_lines_are_broken_between_words_and_only_on_a_terminal() -> None:
    with a_terminal():
        assert columns(sys.stdout) == COLUMNS
    long = "stages of " + " and ".join(["two layers"] * 10)
    assert all(len(line) <= COLUMNS for line in broken(long, COLUMNS).splitlines())
    assert " ".join(broken(long, COLUMNS).split()) == long
    assert broken(long, None) == long
