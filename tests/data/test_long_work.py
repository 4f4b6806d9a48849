"""Long work on a corpus: signals are heard at once, errors stay what they are, and it says how far it is."""

import itertools
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace

import pytest

from skippipe.config.data_options import DataOptions
from skippipe.data import long_work
from skippipe.data.long_work import TextProgress, in_a_thread
from skippipe.data.token_cache import open_cache
from skippipe.data.tokenizer import build_tokenizer
from skippipe.errors import DataError, StoppedError

TRAINED = DataOptions(source="python_stdlib", tokenizer="bpe:300")


@pytest.fixture
def _signal_soon() -> Iterator[None]:
    """Let a signal come in 0.2 s, whose handler raises what that of a training raises.

    It comes again after 2 s: what a handler raises is lost where Python runs a finalizer just then.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedError("stopped by a signal")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.2, 2.0)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


@pytest.mark.usefixtures("_signal_soon")
def test_a_signal_ends_the_training_of_a_tokenizer() -> None:
    endless = ([f"word {number}"] for number in itertools.count())
    start_s = time.monotonic()
    with pytest.raises(StoppedError):
        build_tokenizer(TRAINED, endless)
    assert time.monotonic() - start_s < 5


@pytest.mark.usefixtures("_signal_soon")
def test_a_signal_is_heard_while_a_library_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_work, "LAST_PART_S", 0.1)
    start_s = time.monotonic()
    with pytest.raises(StoppedError):
        in_a_thread(lambda parts: time.sleep(5), ())
    assert time.monotonic() - start_s < 2


@pytest.mark.usefixtures("_signal_soon")
def test_a_signal_ends_tokenising_and_leaves_nothing(tmp_path: Path) -> None:
    options = DataOptions(source="python_stdlib", cache_dir=str(tmp_path))
    with pytest.raises(StoppedError):
        [open_cache(options, seed) for seed in itertools.count()]
    assert list(tmp_path.glob(".*")) == []


def test_text_that_cannot_be_read_is_said_as_that(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    options = DataOptions(source="text", paths=(str(tmp_path),), tokenizer="bpe:300", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"a\.txt: cannot be read as UTF-8"):
        open_cache(options, seed=0)


def test_progress_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(long_work, "SAY_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO), TextProgress("tokenising", 8_000_000) as progress:
        assert list(progress.over(["é" * 1_000_000] * 2)) == ["é" * 1_000_000] * 2
    assert "tokenising: 2 of 8 MB" in caplog.text
    assert "tokenising: 4 of 8 MB" in caplog.text
    assert "tokens/s" not in caplog.text


def test_tokens_are_counted_and_what_was_done_before_is_no_speed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now_s = iter([0.0, 100.0, 110.0])
    monkeypatch.setattr(long_work, "time", SimpleNamespace(monotonic=lambda: next(now_s)))
    with caplog.at_level(logging.INFO), TextProgress("tokenising", 8_000_000) as progress:
        progress.add_former(4_000_000)
        progress.add(2_000_000, 500_000)
    assert "tokenising: 6 of 8 MB, 0.2 MB/s, 50,000 tokens/s" in caplog.text


def test_the_next_part_is_read_meanwhile_and_the_order_stays() -> None:
    read: list[int] = []

    def parts() -> Iterator[int]:
        for number in range(4):
            read.append(number)
            yield number

    found = long_work.one_ahead(lambda number: number**2, parts())
    assert next(found) == (0, 0)
    assert read == [0, 1]
    assert list(found) == [(1, 1), (2, 4), (3, 9)]
