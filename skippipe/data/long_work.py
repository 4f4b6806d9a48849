"""Work on a corpus that takes long: it says how far it is, and ends at once when it is told to."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
        self._bytes = self._former_bytes = self._tokens = 0
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
            self.add(len(piece.encode()))

    def add(self, num_bytes: int, num_tokens: int = 0) -> None:
        """Count text that is done, and the tokens that it became."""
        self._bytes += num_bytes
        self._tokens += num_tokens
        now_s = time.monotonic()
        tokens_per_s = self._tokens / max(now_s - self._start_s, 1e-9)
        if num_tokens:
            self._bar.set_postfix_str(f"{tqdm.format_sizeof(tokens_per_s)} tokens/s", refresh=False)
        self._bar.update(num_bytes)
        if self._bar.disable and now_s - self._said_s > SAY_EVERY_S:
            self._said_s = now_s
            total = f" of {self._total_bytes / 1e6:,.0f}" if self._total_bytes else ""
            speed = (self._bytes - self._former_bytes) / 1e6 / (now_s - self._start_s)
            tokens = f", {tokens_per_s:,.0f} tokens/s" if num_tokens else ""
            logger.info("%s: %s%s MB, %.1f MB/s%s", self._what, f"{self._bytes / 1e6:,.0f}", total, speed, tokens)

    def add_former(self, num_bytes: int) -> None:
        """Count text that was done by a former attempt: it has no part in the speed."""
        self._bytes += num_bytes
        self._former_bytes += num_bytes
        if not self._bar.disable:
            self._bar.initial += num_bytes
        self._bar.update(num_bytes)
        self._start_s = time.monotonic()


def one_ahead(work: Callable[[Part], Result], parts: Iterable[Part]) -> Iterator[tuple[Part, Result]]:
    """Yield each part with what `work` makes of it in a thread, while the next part is read and the last one used."""
    with ThreadPoolExecutor(1, thread_name_prefix="one ahead") as thread:
        before: tuple[Part, Future[Result]] | None = None
        for part in parts:
            following = part, thread.submit(work, part)
            if before is not None:
                yield before[0], before[1].result()
            before = following
        if before is not None:
            yield before[0], before[1].result()


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
