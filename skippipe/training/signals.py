"""What SIGTERM, SIGHUP and Ctrl-C do to a training: it ends at once before its first step, and after a step later on.

Between steps the first signal only sets a flag, which the training loop reads.
"""

import logging
import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any, Final, Self

from skippipe.errors import StoppedError

logger = logging.getLogger(__name__)
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
REPEAT_S = 2.0
"""A launcher passes on the Ctrl-C that its processes have already got; so soon after the first it is the same one."""
UNWIND_S = 5.0
"""Seconds in which a process that has nothing to save ends by itself; one that hangs in a call is ended."""


class StopSignal:
    """While entered, `requested` says whether to stop. A later second Ctrl-C interrupts at once.

    With `at_once` a signal raises `StoppedError` until `defer` is called: there is nothing to save before. A signal
    that is ignored already, as `nohup` does, stays so.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.requested = False
        self.name = ""
        """Of the signal that came first."""
        self._at_once = at_once
        self.first_s = 0.0
        """When it came, by `time.monotonic`."""
        self._previous: dict[int, Any] = {}
        self._bell: tuple[socket.socket, socket.socket] | None = None
        self._previous_bell = -1

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
            if self._at_once:
                self._watch_main_thread()
        return self

    def __exit__(self, *reason: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        self._at_once = False
        if self._bell is not None:
            signal.set_wakeup_fd(self._previous_bell)
            self._bell[0].close()

    def defer(self) -> None:
        """Let signals only set the flag from now on: a step must not be cut in two."""
        self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self.requested and number == signal.SIGINT and now_s - self.first_s > REPEAT_S:
            raise KeyboardInterrupt
        if self.requested:
            return
        self.first_s, self.requested, self.name = now_s, True, signal.Signals(number).name
        if self._at_once:
            raise StoppedError(f"stopped by {self.name} before the first step; the same line starts it again")

    def _watch_main_thread(self) -> None:
        """End the process where the main thread does not: Python runs handlers only once a call of C returns.

        The interpreter writes a byte at once when a signal comes, whatever the main thread does.
        """
        self._bell = socket.socketpair()
        self._bell[0].setblocking(False)
        self._previous_bell = signal.set_wakeup_fd(self._bell[0].fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._end_what_hangs, args=(self._bell[1],), name="signals", daemon=True).start()

    def _end_what_hangs(self, bell: socket.socket) -> None:
        with bell:
            while byte := bell.recv(1):
                if byte[0] not in self._previous:
                    continue
                time.sleep(UNWIND_S)
                if self._at_once:
                    name = signal.Signals(byte[0]).name
                    logger.error("stopped by %s before the first step, in a call that does not return", name)
                    logging.shutdown()
                    os._exit(StoppedError.exit_code)
