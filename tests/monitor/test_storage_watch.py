"""A write that hangs is said, and ends the process after a limit; one that does not hang is not."""

import logging
import threading
import time
from pathlib import Path

import pytest

from skippipe.monitor.storage_watch import StorageWatch

PATH = Path("runs/slow/metrics.jsonl")


def test_a_write_that_hangs_is_said_and_ends_the_process(caplog: pytest.LogCaptureFixture) -> None:
    ended = threading.Event()
    watch = StorageWatch(0.15, word_s=0.05, end=ended.set)
    with caplog.at_level(logging.WARNING), watch.writing(PATH):
        assert ended.wait(10)
    words = [record.getMessage() for record in caplog.records]
    assert words[0].startswith(f"{PATH}: training waits for the storage")
    assert words[-1].startswith(f"{PATH}: the storage has not taken a write for")


def test_many_short_writes_are_no_long_one(caplog: pytest.LogCaptureFixture) -> None:
    ended = threading.Event()
    watch = StorageWatch(0.3, word_s=0.2, end=ended.set)
    with caplog.at_level(logging.WARNING):
        for _ in range(40):
            with watch.writing(PATH):
                time.sleep(0.01)
    watch.close()
    assert not ended.is_set()
    assert not caplog.records
