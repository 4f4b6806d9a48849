"""The store of one epoch, in which no wait outlasts it."""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from torch._C._distributed_c10d import Store, TCPStore

from skippipe.errors import CommunicationError
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.torch_errors import raising_outside


class EpochStore(Store):
    """Another store, which is asked again and again instead of waited in.

    torch connects process groups through a store and waits in it for every peer, for as long as the groups may wait. A
    peer that dies before it has come would hold up all others for so long. Here a wait ends with the epoch: `ended`
    says why it does, None while it stands. No wait is longer than `limit_s`.

    torch's own stores do not keep what is written in Python: who hands this one to torch has to keep it as well.
    """

    def __init__(self, store: Store, limit_s: float, ended: Callable[[], str | None]) -> None:
        super().__init__()
        self._store = store
        self._ended = ended
        self._limit_s = limit_s

    def set(self, key: str, value: str) -> None:
        """Put a value under a key."""
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        """Return the value of a key once it is there."""
        self.wait([key])
        return self._store.get(key)

    def add(self, key: str, amount: int) -> int:
        """Add to a number; return the sum."""
        return self._store.add(key, amount)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Replace a value where it is the expected one; return what is there then."""
        return self._store.compare_set(key, expected, desired)

    def check(self, keys: Sequence[str]) -> bool:
        """Say whether all keys are there."""
        return self._store.check(list(keys))

    def delete_key(self, key: str) -> bool:
        """Remove a key."""
        return self._store.delete_key(key)

    def num_keys(self) -> int:
        """Count the keys."""
        return self._store.num_keys()

    deleteKey, getNumKeys = delete_key, num_keys  # noqa: N815  # as torch calls them from C++

    def set_timeout(self, timeout: timedelta) -> None:
        """Set how long a wait may last."""
        self._limit_s = timeout.total_seconds()

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys are there; raise `RuntimeError`, as torch's stores do, at the end of time or epoch."""
        limit_s = self._limit_s if timeout is None else timeout.total_seconds()
        deadline_s = time.monotonic() + limit_s
        while not self.check(keys):
            if (reason := self._ended()) is not None:
                raise RuntimeError(reason)
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"nobody has put {', '.join(keys)} into the store within {limit_s:g} s")
            time.sleep(time_limits.STORE_POLL_S)


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
        connect, lambda cause: CommunicationError(f"the store of the new epoch at {host}:{port}: {cause}")
    )
    return EpochStore(store, limit_s, ended)
