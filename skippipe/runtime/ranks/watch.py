"""A look-out beside the thread that computes, which may stand in a call of torch that has no limit of its own.

Once a second it asks the store, over a connection of its own, whether this try still stands. It notices that the store
is gone or gives no answer, that the agent which started this process is dead, that a rank was started again, and that
one has ended by itself. The computing thread asks `check` where it can; where it does not end in time, this thread ends
the process.
"""

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import NamedTuple

from torch._C._distributed_c10d import Store

from skippipe.errors import CommunicationError, PeerLostError, SkipPipeError
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.remote_errors import error_elsewhere
from skippipe.runtime.ranks.store_names import ENDED, TRY, store_of_try

logger = logging.getLogger(__name__)


class End(NamedTuple):
    """Why this process has to end. How long it may take to do so by itself follows from who decided it."""

    error: SkipPipeError
    by_others: bool = False

    @property
    def grace_s(self) -> float:
        """Return how long it may take."""
        return time_limits.ENDED_GRACE_S if self.by_others else time_limits.ORPHAN_GRACE_S


class Watch:
    """Watches from its beginning until `close`. Without a store it watches the parent alone."""

    def __init__(
        self, run: Store | None, number: int, *, address: str = "", limit_s: float = 0.0, parent: int | None = None
    ) -> None:
        """Watch try `number` in the store of a run at `address`, silent for `limit_s` at most, and process `parent`."""
        self._run = run
        self._number = number
        self._address = address
        self._limit_s = limit_s
        self._parent = parent
        self._answers = 0
        self._end: End | None = None
        self._ending = False
        self.also: Callable[[Store], None] | None = None
        """What else is to be done at each look; it gets this thread's store of the try."""
        self._followed: Store | None = None
        self._gone: Store | None = None
        self._closed = threading.Event()
        self._begin(self._wait_for_end)
        if run is not None:
            self._begin(self._ask)

    def check(self) -> None:
        """Raise the error with which this process has to end, where there is one."""
        if self._end is not None and not self._closed.is_set():
            raise self._end.error

    def let_end(self) -> None:
        """Heed the others no more: this process ends by itself, and may finish a checkpoint.

        The store and the agent are still watched, because it may wait for the store.
        """
        self._ending = True
        if self._end is not None and self._end.by_others:
            self._end = None

    def follow(self, store: Store) -> None:
        """Take from now on that members agree on who is lost: neither the run's store nor this one has to live.

        `also` gets this store, that of the present epoch; the parent is still watched.
        """
        begins = self._run is None and self._followed is None
        self._followed = store
        if begins:
            self._begin(self._ask)

    def close(self) -> None:
        """Look no more: this process ends by itself, or no longer needs the others."""
        self._closed.set()

    @staticmethod
    def _begin(call: Callable[[], None]) -> None:
        threading.Thread(target=call, name="watch", daemon=True).start()

    def _ask(self) -> None:
        """Ask the store again and again; runs in a thread, which the store may keep for ever."""
        while not self._closed.is_set():
            if self._followed is not None:
                self._look_along(self._followed)
                continue
            assert self._run is not None
            try:
                found = self._look(self._run)
            except RuntimeError as reason:
                lost = f"the store at {self._address} is gone ({_first_line(reason)}); its process or host may be lost"
                self._end = End(PeerLostError(lost))
                return
            self._answers += 1
            if not self._ending:
                self._end = self._end or found
            self._closed.wait(time_limits.WATCH_S)

    def _look(self, run: Store) -> End | None:
        number = int(run.add(TRY, 0))
        if self._end is not None or self._ending:
            return None
        if number > self._number:
            again = "a rank of this run was started again, so this try cannot go on; start this one again, too"
            return End(PeerLostError(again), by_others=True)
        if self.also is not None:
            self.also(store_of_try(run, self._number))
        ended = hear_ended(store_of_try(run, self._number))
        return End(ended, by_others=True) if ended is not None else None

    def _look_along(self, store: Store) -> None:
        try:
            if self.also is not None and store is not self._gone:
                self.also(store)
        except RuntimeError:  # it ends with its epoch; torch writes a page about each further question
            self._gone = store
        self._closed.wait(time_limits.WATCH_S)

    def _wait_for_end(self) -> None:
        """Look at parent and answers; end this process where it does not do so itself. Runs in a thread.

        Silence is counted in looks, not by the clock: a process that was itself stopped hears nothing meanwhile.
        """
        silent, answers, until_s = 0, -1, math.inf
        while not self._closed.wait(time_limits.WATCH_S):
            end = self._end
            until_s = min(until_s, time.monotonic() + end.grace_s) if end is not None else math.inf
            if end is not None and time.monotonic() > until_s:
                _end_process(end.error)
            silent = silent + 1 if self._answers == answers else 0
            answers = self._answers
            if end is not None and not end.by_others:
                continue
            if self._run is not None and self._followed is None and (silent + 1) * time_limits.WATCH_S >= self._limit_s:
                mute = f"the store at {self._address} has not answered for {self._limit_s:g} s"
                error = CommunicationError(f"{mute}; its process or host may be frozen, or the network cut")
                self._end = End(error)
            if self._parent is not None and os.getppid() != self._parent:
                gone = PeerLostError(f"the launcher's agent (process {self._parent}) on this host is gone")
                self._end = End(gone)


def open_watch(
    store: Store | None, number: int, values: Mapping[str, str], limit_s: float, *, under_agent: bool
) -> Watch:
    """Watch a try of a run, `store` being that of the run, over a new connection; and the agent where there is one."""
    run: Store | None = None if store is None else store.clone()  # type: ignore[attr-defined]  # not in torch's stubs
    if run is not None:
        run.set_timeout(timedelta(seconds=limit_s))
    address = f"{values.get('MASTER_ADDR', '')}:{values.get('MASTER_PORT', '')}"
    return Watch(run, number, address=address, limit_s=limit_s, parent=os.getppid() if under_agent else None)


def say_ended(store: Store, rank: int, content: Mapping[str, object], world_size: int, *, stay: bool) -> None:
    """Say in a try's store that a rank ends by itself and why, unless one has done so before.

    With `stay` it waits until all others know, for a moment at most, because the launcher ends them when this one ends.
    """
    own = json.dumps({"rank": rank, "error": content})
    try:
        if store.compare_set(ENDED, "", own).decode() != own or not stay:
            return
        deadline_s = time.monotonic() + time_limits.LAST_WORDS_S
        while store.add(f"{ENDED}-heard", 0) < world_size - 1 and time.monotonic() < deadline_s:
            time.sleep(time_limits.STORE_POLL_S)
    except RuntimeError:
        return


def hear_ended(store: Store) -> SkipPipeError | None:
    """Return the error with which the first rank of a try ended by itself, and say so there; None where none has."""
    if not store.check([ENDED]):
        return None
    note = json.loads(store.get(ENDED))
    store.add(f"{ENDED}-heard", 1)
    return error_elsewhere(note["error"], f"rank {note['rank']}")


def _end_process(error: SkipPipeError) -> None:
    logger.error("%s; this process ends now, it hangs in a call that does not return", error)
    logging.shutdown()
    os._exit(error.exit_code)


def _first_line(reason: Exception) -> str:
    return (str(reason).splitlines() or [type(reason).__name__])[0]
