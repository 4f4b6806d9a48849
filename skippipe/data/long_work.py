"""Work on a corpus that takes long: it says how far it is, and ends at once when it is told to."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Self, TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)
SAY_EVERY_S: Final = 10.0
"""Seconds between two lines of progress, where there is no terminal for a bar."""
LOOK_EVERY_S: Final = 0.05
"""Seconds in which the main thread may be deaf."""
LAST_PART_S: Final = 1.0
"""Seconds that work which is told to end may take for it: it hears of that at its next part."""

Part = TypeVar("Part")
Result = TypeVar("Result")


class TextProgress:
    """How much text is done: a bar on a terminal, else a line now and then."""

    def __init__(self, what: str, total_bytes: int | None = None) -> None:
        self._what, self._total_bytes = what, total_bytes
        self._bytes = 0
        self._start_s = self._said_s = time.monotonic()
        self._bar = tqdm(
            total=total_bytes,
            desc=what,
            unit="B",
            unit_scale=True,
            leave=False,
            delay=1.0,
            disable=not sys.stderr.isatty(),
            file=sys.stderr,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        self._bar.close()

    def over(self, pieces: Iterable[str]) -> Iterator[str]:
        """Yield the pieces of a text, and count them."""
        for piece in pieces:
            yield piece
            self._count(len(piece.encode()))

    def _count(self, num_bytes: int) -> None:
        self._bytes += num_bytes
        self._bar.update(num_bytes)
        now_s = time.monotonic()
        if self._bar.disable and now_s - self._said_s > SAY_EVERY_S:
            self._said_s = now_s
            total = f" of {self._total_bytes / 1e6:,.0f}" if self._total_bytes else ""
            speed = self._bytes / 1e6 / (now_s - self._start_s)
            logger.info("%s: %s%s MB, %.1f MB/s", self._what, f"{self._bytes / 1e6:,.0f}", total, speed)


def in_a_thread(work: Callable[[Iterator[Part]], Result], parts: Iterable[Part]) -> Result:
    """Return what `work` makes of `parts`. A signal is heard at once meanwhile, and what it raises is raised here.

    Python runs the handlers of signals in the main thread, between two steps of its own: a long call of a library there
    would hold them up. What reading `parts` raises is raised here too, as what it is.
    """
    stopped, done = threading.Event(), threading.Event()
    failures: list[BaseException] = []
    results: list[Result] = []

    def watched() -> Iterator[Part]:
        try:
            for part in parts:
                if stopped.is_set():
                    raise InterruptedError("told to stop")
                yield part
        except BaseException as failure:
            failures.append(failure)
            raise

    def run() -> None:
        try:
            results.append(work(watched()))
        except BaseException as failure:
            failures.append(failure)
        done.set()

    threading.Thread(target=run, name="long work", daemon=True).start()
    try:
        while not done.wait(LOOK_EVERY_S):
            pass
    except BaseException:
        stopped.set()
        done.wait(LAST_PART_S)
        raise
    if failures:
        raise failures[0]
    return results[0]
