"""A step that takes longer than a scheduler waits is given up, and what was finished before it is saved.

Weights change only behind the one sum of all ranks at the end of a step. A rank that gives the step up before it has
given its part to that sum makes it impossible for all, so that all ranks stand where the step before left them. It says
so in the store, then closes its connections, which wakes all others.
"""

import threading
import time
from collections.abc import Callable

from torch._C._distributed_c10d import Store

from skippipe.errors import StoppedError
from skippipe.runtime.ranks.failure_board import give_step_up, step_is_given_up
from skippipe.training.signals import StopSignal


class StepPatience:
    """Gives a step up that is not finished `patience_s` after a signal, on this rank or on another one."""

    def __init__(self, stop: StopSignal, patience_s: float, abort: Callable[[], None] | None) -> None:
        """`abort` makes every wait for other ranks fail, here and there; None where there is no other rank."""
        self._stop = stop
        self._patience_s = patience_s
        self._abort = abort
        self._lock = threading.Lock()
        self._may_give_up = False
        self._given_up = False

    def begin(self) -> None:
        """A step begins: nothing of it is final."""
        self.check()
        with self._lock:
            self._may_give_up = True

    def commit(self) -> None:
        """Give no step up from now on, because this rank's part goes into the sum; raises as `check` does."""
        with self._lock:
            self._may_give_up = False
        self.check()

    def check(self) -> None:
        """Raise `StoppedError` where the step was given up; called where a step may be left.

        A process alone gives it up here; one of several leaves that to `look`, which tells the others.
        """
        if self._abort is None and self._may_give_up and self._overdue:
            self._given_up = True
        if self._given_up:
            raise StoppedError(
                f"the step was not finished {self._patience_s:g} s after {self._stop.name or 'a signal'}"
            )

    def look(self, store: Store) -> None:
        """Give the step up where it is time, or where another rank has; called again and again by the watch."""
        if not self._overdue and not step_is_given_up(store):
            return
        with self._lock:
            if not self._may_give_up:
                return
            self._may_give_up, self._given_up = False, True
        give_step_up(store)
        if self._abort is not None:
            self._abort()

    @property
    def _overdue(self) -> bool:
        return self._stop.requested and time.monotonic() - self._stop.first_s > self._patience_s
