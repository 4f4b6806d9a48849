"""How processes that no launcher has started meet: at an address of the first one's host."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from torch._C._distributed_c10d import Store

from skippipe.errors import CommunicationError, ConfigError
from skippipe.membership.addresses import Place, interface_towards
from skippipe.runtime.ranks.arrival import open_store
from skippipe.runtime.ranks.store_names import NUM_PLACES, PLACE, store_of_run

PLACES: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SKIPPIPE_NODE")
"""Environment variables by which a launcher gives a process its place."""


def take_place(rank: int, world_size: int, store: Place) -> None:
    """Set what a launcher would: this process is a rank among so many, who meet at this store.

    Raises `CommunicationError` where no interface of this host leads there.
    """
    local_rank = os.environ.get("LOCAL_RANK", "0")
    for name in PLACES:
        os.environ.pop(name, None)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": local_rank}
    os.environ |= {"MASTER_ADDR": store.host, "MASTER_PORT": str(store.port)}
    interface = interface_towards(store.host, store.port)
    if interface is None:
        raise CommunicationError(f"{store.host}: no interface of this host leads there; set GLOO_SOCKET_IFNAME to one")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


@contextmanager
def meeting_at(place: Place, timeout_s: float, world_size: int | None) -> Iterator[None]:
    """Take a place among processes that meet at an address: the first where their number is given, else the next.

    While it is entered, this process is a rank as if a launcher had started it, and the first one keeps the store.

    Raises:
        CommunicationError: Nobody answers there within `timeout_s`.
        ConfigError: All places are taken.
    """
    is_first = world_size is not None
    take_place(0 if is_first else 1, world_size or 2, place)
    launched = open_store(os.environ, 0 if is_first else 1, timeout_s)
    store = store_of_run(launched)
    if is_first:
        store.set(NUM_PLACES, str(world_size))
    else:
        num_places = int(store.get(NUM_PLACES))
        rank = next_free_rank(store, num_places)
        if rank is None:
            raise ConfigError(f"{place}: all {num_places} processes have come already; give --processes more there")
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_places)}
    yield


def next_free_rank(store: Store, world_size: int) -> int | None:
    """Take the first rank after 0 that nobody has taken, and return it; None where there is none."""
    own = secrets.token_hex(16)
    for rank in range(1, world_size):
        if store.compare_set(f"{PLACE}/{rank}", "", own).decode() == own:
            return rank
    return None
