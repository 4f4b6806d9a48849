"""How the processes of a run find each other in the launcher's store, and find each other again after a restart.

torchrun's agents keep their store while they start ranks again, and each agent counts its restarts for itself. So the
store counts tries: a rank takes its seat in the present one, and all keys of a try lie under its number. Where an
earlier process of the same rank has the seat, that try can never be complete again, and the next one begins. Ranks
that still wait in the old one move on to it; ranks that compute in it lose a connection, end, and are started again.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple, Self

from torch._C._distributed_c10d import Store, TCPStore

from skippipe.errors import CommunicationError, ConfigError
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.store_names import CONTACTS, TRY
from skippipe.runtime.ranks.torch_errors import raising_outside

logger = logging.getLogger(__name__)
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""What torchrun's agent sets to "True" where it holds the store itself."""


class Seat(NamedTuple):
    """Who takes part in a try: its rank as the launcher counts, its rank in the run, and which process that is."""

    launched_rank: int
    rank: int
    host: str
    process: int

    @classmethod
    def of_this_process(cls, launched_rank: int, rank: int) -> Self:
        """Return the seat of this process."""
        return cls(launched_rank, rank, socket.gethostname(), os.getpid())

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


def open_store(values: Mapping[str, str], launched_rank: int, timeout_s: float) -> Store:
    """Connect to the store at MASTER_ADDR and MASTER_PORT; rank 0 opens it where no agent of torchrun has done so.

    Raises `ConfigError` where the port is none and `CommunicationError` where nobody answers within `timeout_s`.
    """
    host, port = values["MASTER_ADDR"], values["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"MASTER_PORT must be a port number from 1 to 65535, not {port!r}")

    def connect() -> Store:
        return TCPStore(
            host,
            int(port),
            is_master=holds_store(values, launched_rank),
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )

    return raising_outside(
        connect,
        lambda cause: CommunicationError(
            f"rank {launched_rank} could not reach the store at {host}:{port} within {timeout_s:g} s: {cause}; "
            "check that the process of node rank 0 runs there and that the address can be reached from here"
        ),
        kinds=(RuntimeError, ValueError),
    )


def holds_store(values: Mapping[str, str], launched_rank: int) -> bool:
    """Say whether the store ends with the process of this rank."""
    return launched_rank == 0 and values.get(AGENT_STORE) != "True"


def arrive(store: Store, own: Seat, nodes: Sequence[str], world_size: int, limit_s: float) -> int:
    """Take a seat and return the number of the try once all `world_size` ranks sit in it and have seen each other.

    Raises `CommunicationError` naming the ranks that have not come within `limit_s`, and `ConfigError` where two
    processes are the same rank or the same one of `nodes`.
    """
    start_s = time.monotonic()
    said = False
    number = _take_seat(store, own, arriving=True)
    while not _all_are_here(store, number, own, world_size):
        if store.add(TRY, 0) > number:
            number = _take_seat(store, own, arriving=False)
            continue
        waited_s = time.monotonic() - start_s
        if waited_s > time_limits.ARRIVAL_WORD_S and not said:
            logger.info("rank %d waits for %s", own.launched_rank, _missing(store, number, world_size))
            said = True
        if waited_s > limit_s:
            missing = _missing(store, number, world_size)
            raise CommunicationError(
                f"rank {own.launched_rank} of {world_size} waited {limit_s:g} s in vain for {missing}; "
                "see why they did not start, or start them"
            )
        time.sleep(time_limits.STORE_POLL_S)
    _check_ranks([Seat(*json.loads(seat)) for seat in store.multi_get(_seats(number, world_size))], nodes)
    return number


class ContactNotes:
    """Leaves in a run's store how its members can be reached, for who comes later, as long as that store answers.

    Nobody waits for it: its host may be frozen or cut off, and torch waits for an answer for a quarter of an hour.
    """

    def __init__(self, run: Store) -> None:
        self._run = run
        self._leaving: threading.Thread | None = None

    def leave(self, text: str) -> None:
        """Leave a text in the background; none where the one before still waits."""
        if self._leaving is None or not self._leaving.is_alive():
            self._leaving = threading.Thread(target=self._leave, args=(text,), name="contact-notes", daemon=True)
            self._leaving.start()

    def _leave(self, text: str) -> None:
        with suppress(RuntimeError):  # its host is lost
            self._run.set(f"{CONTACTS}/{int(self._run.add(CONTACTS, 1))}", text)


def left_contacts(run: Store) -> list[str]:
    """Return all that `ContactNotes` have left, the newest first."""
    keys = [f"{CONTACTS}/{number}" for number in range(int(run.add(CONTACTS, 0)), 0, -1)]
    return [run.get(key).decode() for key in keys if run.check([key])]


def _take_seat(store: Store, own: Seat, *, arriving: bool) -> int:
    """Return the number of the try in which this process has a seat now; one that arrives may begin a new one."""
    text = json.dumps(own)
    while True:
        number = int(store.add(TRY, 0))
        holder = store.compare_set(_seats(number, own.launched_rank + 1)[-1], "", text).decode()
        if holder == text:
            return number
        if not arriving:
            raise ConfigError(
                f"rank {own.launched_rank} was started twice: as {Seat(*json.loads(holder))}, and as {own}; "
                "give each host its own --node-rank, and each run its own port"
            )
        store.compare_set(TRY, str(number), str(number + 1))


def _seats(number: int, world_size: int) -> list[str]:
    return [f"try-{number}/seat/{rank}" for rank in range(world_size)]


def _all_are_here(store: Store, number: int, own: Seat, world_size: int) -> bool:
    """Say whether every rank has seen all seats taken: one that has died since it took its own has not."""
    if not store.check(_seats(number, world_size)):
        return False
    store.set(_here(number, own.launched_rank), "")
    return bool(store.check([_here(number, rank) for rank in range(world_size)]))


def _here(number: int, rank: int) -> str:
    return f"try-{number}/here/{rank}"


def _missing(store: Store, number: int, world_size: int) -> str:
    seats = _seats(number, world_size)
    absent = [rank for rank, seat in enumerate(seats) if not store.check([seat])]
    silent = [rank for rank in range(world_size) if not store.check([_here(number, rank)])]
    return ", ".join(f"rank {rank}" for rank in absent or silent)


def _check_ranks(seats: Sequence[Seat], nodes: Sequence[str]) -> None:
    """Raise `ConfigError`, the same on every rank, where two processes are one rank of the run."""
    holder: dict[int, Seat] = {}
    for seat in seats:
        other = holder.setdefault(seat.rank, seat)
        if other is not seat:
            name = nodes[seat.rank] if seat.rank < len(nodes) else str(seat.rank)
            raise ConfigError(
                f"SKIPPIPE_NODE: two processes are node {name!r}: {other}, and {seat}; name each node of the cluster "
                "once, for every process"
            )
