"""The store of one epoch, in which no wait outlasts it."""

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Final, TypeVar

from torch._C._distributed_c10d import Store, TCPStore

from skippipe.errors import CommunicationError
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.torch_errors import raising_outside

Answer = TypeVar("Answer")
NONE: Final = "skippipe: nobody has put anything here"
"""What is no value of any key."""


class EpochStore(Store):
    """Another store, which is asked again and again instead of waited in.

    torch connects process groups through a store and waits in it for every peer, for as long as the groups may wait. A
    peer that dies before it has come would hold up all others for so long. Here a wait ends with the epoch: `ended`
    says why it does, None while it stands. No wait is longer than `limit_s`.

    A question is a wait as well: the host of the store may be frozen or cut off, and then torch waits for the answer as
    long as TCP does, a quarter of an hour.

    And every question travels to the store's host and back, while torch asks four times for each value that it waits
    for. Here that is one question: a wait brings the value along, for the `get` that follows.

    torch's own stores do not keep what is written in Python: who hands this one to torch has to keep it as well.
    """

    def __init__(self, store: Store, limit_s: float, ended: Callable[[], str | None]) -> None:
        super().__init__()
        self._store = store
        self._ended = ended
        self._limit_s = limit_s
        self._is_over = False
        self._awaited: tuple[str, bytes] | None = None
        """The key that was waited for last, and its value, until anything else is asked."""

    def end(self) -> None:
        """Let all who wait here go: another epoch has begun."""
        self._is_over = True

    def set(self, key: str, value: str) -> None:
        """Put a value under a key."""
        self._ask(lambda: self._store.set(key, value))

    def get(self, key: str) -> bytes:
        """Return the value of a key once it is there."""
        awaited, self._awaited = self._awaited, None
        return awaited[1] if awaited is not None and awaited[0] == key else self._wait_for(key, self._limit_s)

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """Return the values of keys that are there."""
        return self._ask(lambda: self._store.multi_get(list(keys)))

    def add(self, key: str, amount: int) -> int:
        """Add to a number; return the sum."""
        return self._ask(lambda: self._store.add(key, amount))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Replace a value where it is the expected one; return what is there then."""
        return self._ask(lambda: self._store.compare_set(key, expected, desired))

    def check(self, keys: Sequence[str]) -> bool:
        """Say whether all keys are there."""
        return self._ask(lambda: self._store.check(list(keys)))

    def delete_key(self, key: str) -> bool:
        """Remove a key."""
        return self._ask(lambda: self._store.delete_key(key))

    def num_keys(self) -> int:
        """Count the keys."""
        return self._ask(self._store.num_keys)

    deleteKey, getNumKeys = delete_key, num_keys  # noqa: N815  # as torch calls them from C++

    def set_timeout(self, timeout: timedelta) -> None:
        """Set how long a wait may last."""
        self._limit_s = timeout.total_seconds()

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys are there; raise `RuntimeError`, as torch's stores do, at the end of time or epoch."""
        limit_s = self._limit_s if timeout is None else timeout.total_seconds()
        if len(keys) == 1:
            self._awaited = (keys[0], self._wait_for(keys[0], limit_s))
        else:
            self._poll(lambda: self.check(keys) or None, keys, limit_s)

    def _wait_for(self, key: str, limit_s: float) -> bytes:
        """Return the value of a key once it is there."""

        def look() -> bytes | None:
            found = self.compare_set(key, NONE, NONE)  # changes nothing, and tells what is there, or what it was given
            return None if found == NONE.encode() else found

        return self._poll(look, [key], limit_s)

    def _poll(self, look: Callable[[], Answer | None], keys: Sequence[str], limit_s: float) -> Answer:
        """Look until something is found."""
        deadline_s = time.monotonic() + limit_s
        while (found := look()) is None:
            if (reason := self._why_over()) is not None:
                raise RuntimeError(reason)
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"nobody has put {', '.join(keys)} into the store within {limit_s:g} s")
            time.sleep(time_limits.STORE_POLL_S)
        return found

    def _why_over(self) -> str | None:
        return "its epoch is over" if self._is_over else self._ended()

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        self._awaited = None
        return answered(question, self._why_over)


def answered(question: Callable[[], Answer], ended: Callable[[], str | None]) -> Answer:
    """Return the answer to a question that torch may wait for without end; raise `RuntimeError` once `ended` says why.

    The thread that still waits then is left to itself: nothing wakes it.
    """
    done, answers, errors = threading.Event(), list[Answer](), list[str]()

    def ask() -> None:
        try:
            answers.append(question())
        except RuntimeError as reason:
            errors.append(str(reason))
        finally:
            done.set()

    threading.Thread(target=ask, name="store-question", daemon=True).start()
    while not done.wait(time_limits.STORE_POLL_S):
        if (reason := ended()) is not None:
            raise RuntimeError(reason)
    if errors:
        raise RuntimeError(errors[0])
    return answers[0]


def host_store(host: str, limit_s: float) -> tuple[TCPStore, int]:
    """Open a new store in this process, for an epoch that begins; return it and its port."""

    def serve() -> TCPStore:
        return TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=limit_s))

    store = raising_outside(serve, lambda cause: CommunicationError(f"no store can be opened on {host}: {cause}"))
    return store, store.port


def reach_store(host: str, port: int, limit_s: float, ended: Callable[[], str | None]) -> EpochStore:
    """Connect to the store of an epoch; raise `CommunicationError` where nobody answers."""

    def connect() -> Store:
        return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=limit_s))

    store = raising_outside(
        lambda: answered(connect, ended),
        lambda cause: CommunicationError(f"the store of the new epoch at {host}:{port}: {cause}"),
    )
    return EpochStore(store, limit_s, ended)
