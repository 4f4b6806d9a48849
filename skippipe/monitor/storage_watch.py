"""What the training thread writes itself hangs where its storage hangs: that is said, and ends the process at last.

A call that hangs in the kernel cannot be ended by the thread that waits in it, nor by a signal.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from skippipe.runtime.ranks import time_limits

logger = logging.getLogger(__name__)
LOOKS = 20
"""How often it is looked within the time to the first word."""


def end_process() -> None:
    """End at once with the exit code of a failure at run time: nothing can be saved to storage that hangs."""
    logging.shutdown()
    os._exit(1)


class StorageWatch:
    """Looks at what one thread writes, from its creation until `close`."""

    def __init__(
        self,
        limit_s: float,
        *,
        word_s: float = time_limits.STORAGE_WORD_S,
        end: Callable[[], None] = end_process,
    ) -> None:
        """Say after `word_s`, and again and again, that a write hangs, and `end` the process after `limit_s`."""
        self._limit_s, self._word_s, self._end = limit_s, word_s, end
        self._writing: tuple[Path, float] | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._look, name="storage", daemon=True).start()

    @contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Watch what is written to `path` while entered."""
        self._writing = path, time.monotonic()
        try:
            yield
        finally:
            self._writing = None

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def _look(self) -> None:
        said_s = 0.0
        while not self._closed.wait(self._word_s / LOOKS):
            writing = self._writing
            if writing is None:
                said_s = 0.0
                continue
            path, since_s = writing
            waited_s = time.monotonic() - since_s
            if waited_s > self._limit_s:
                logger.error(
                    "%s: the storage has not taken a write for %.0f s; this process ends, see to the storage and start "
                    "again from the newest checkpoint, or raise checkpoint.timeout_s",
                    path,
                    waited_s,
                )
                self._end()
                return
            if waited_s > said_s + self._word_s:
                said_s = waited_s
                logger.warning("%s: training waits for the storage, for %.0f s by now", path, waited_s)
