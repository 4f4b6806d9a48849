"""A polite stop: the first SIGTERM or SIGINT only sets a flag, which the training loop reads between iterations."""

import signal
import threading
import time
from types import FrameType
from typing import Any, Self

REPEAT_S = 2.0
"""A launcher passes on the Ctrl-C that its processes have already got; so soon after the first it is the same one."""


class StopSignal:
    """While entered, `requested` says whether to stop. A later second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._first_s = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *reason: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self.requested and number == signal.SIGINT and now_s - self._first_s > REPEAT_S:
            raise KeyboardInterrupt
        if not self.requested:
            self._first_s = now_s
        self.requested = True
