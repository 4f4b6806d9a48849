"""Ranks that the demo starts: one that fails ends all, and so does a signal."""

import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Timer

import pytest
from processes import preloaded

from skippipe.cli.demo.ranks import run_ranks
from skippipe.errors import SkipPipeError

pytestmark = pytest.mark.timeout(90)


def said_by(end: Callable[[Connection, Path], None], path: Path) -> str:
    """Return what a process of its own says, because torchrun's agent takes the signals of its process."""
    context = preloaded()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=end, args=(sender, path))
    process.start()
    assert receiver.poll(80)
    said: str = receiver.recv()
    process.join(10)
    return said


def fail(sender: Connection, missing: Path) -> None:
    try:
        run_ranks(["validate", str(missing)], 2)
    except SkipPipeError as error:
        sender.send(str(error))


def be_interrupted(sender: Connection, pipe: Path) -> None:
    Timer(2.0, os.kill, [os.getpid(), signal.SIGINT]).start()
    try:
        run_ranks(["validate", str(pipe)], 1)
    except KeyboardInterrupt:
        sender.send("interrupted")


def test_a_rank_that_fails_is_named_with_its_exit_code(tmp_path: Path) -> None:
    assert "ended with exit code 2; see above for the reason" in said_by(fail, tmp_path / "missing.json")


def test_a_signal_ends_all_ranks(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "nobody-writes.json")
    assert said_by(be_interrupted, tmp_path / "nobody-writes.json") == "interrupted"
