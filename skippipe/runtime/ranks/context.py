"""Which process this is, and how processes meet: torchrun's environment, or one process alone."""

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from skippipe.errors import CommunicationError, ConfigError, EpochEndedError
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.arrival import Seat, arrive, holds_store, left_contacts, open_store
from skippipe.runtime.ranks.remote_errors import error_content
from skippipe.runtime.ranks.store_names import Topic, store_of_run, store_of_try
from skippipe.runtime.ranks.torch_errors import raising_outside
from skippipe.runtime.ranks.watch import Watch, open_watch, say_ended

if TYPE_CHECKING:
    from skippipe.membership.live_run import LiveRun
    from skippipe.membership.membership import Membership

NEEDED = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MOST_RANKS = 4096
"""As many as a cluster can have nodes."""


@dataclass
class DistributedContext:
    """The place of this process among all of them. `store` is None where it runs alone."""

    rank: int
    world_size: int
    local_rank: int
    timeout_s: float
    store: Store | None = None
    holds_store: bool = False
    """Whether the store may end with this process: it does on the first one of a launch without torchrun's agent."""
    watch: Watch | None = None
    """What sees that the others or the launcher are gone while this process waits."""
    membership: "Membership | None" = None
    """Who is in the run, where it outlives its processes; None where it ends with any of them."""
    live_run: "LiveRun | None" = None
    """The run under way that this process is to join: so far it is alone. `rank` is that of its node in the cluster."""
    run_store: Store | None = None
    """Where members leave how they can be reached (`arrival.ContactNotes`), as long as the launcher's store lives."""
    _meetings: Counter[Topic] = field(default_factory=Counter, init=False, repr=False)
    """How often ranks have met about each topic: the same on all ranks, so that no meeting finds another one's keys."""
    _meeting: str = field(default="", init=False, repr=False)
    """Under what the last one's keys lie."""

    @classmethod
    def from_environment(
        cls,
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
        nodes: Sequence[str] = (),
        patience_s: float = 0.0,
        process_groups: bool = True,
        find_live_run: "Callable[[Sequence[str]], LiveRun | None] | None" = None,
        arrival_s: float = 0.0,
    ) -> Self:
        """Read torchrun's variables and meet the other processes; without them, one process runs alone.

        The others may come `patience_s` later than the timeout, where they have work to do before.
        Where the launcher hands out ranks in any order, SKIPPIPE_NODE says which of `nodes` this process is; its rank
        is then the position of that name.
        They may be started `arrival_s` later than that.
        Without `process_groups` they only share a store.
        `find_live_run` gets what members have left in the store. Where it returns a run, this process meets nobody.
        Raises `ConfigError` where variables are missing and `CommunicationError` where the others do not come.
        """
        values = os.environ if environment is None else environment
        if "RANK" not in values:
            return cls(0, 1, 0, timeout_s)
        missing = [name for name in NEEDED if name not in values]
        if missing:
            raise ConfigError(f"RANK is set but {', '.join(missing)} not; start with torchrun, or unset RANK")
        try:
            rank, world_size = int(values["RANK"]), int(values["WORLD_SIZE"])
            local_rank = int(values.get("LOCAL_RANK", "0"))
        except ValueError as error:
            raise ConfigError(f"RANK, LOCAL_RANK and WORLD_SIZE must be numbers: {error}") from None
        if not (0 <= rank < world_size <= MOST_RANKS and local_rank >= 0):
            raise ConfigError(
                f"RANK is {rank}, LOCAL_RANK {local_rank} and WORLD_SIZE {world_size}; ranks count from 0 up to "
                f"WORLD_SIZE - 1, of which at most {MOST_RANKS} can be"
            )
        under_agent = "TORCHELASTIC_RUN_ID" in values
        if world_size == 1:
            alone = open_watch(None, 0, values, timeout_s, under_agent=under_agent)
            return cls(rank, world_size, local_rank, timeout_s, watch=alone)
        own_rank = _rank_of_node(values, nodes, rank)
        limit_s = timeout_s + patience_s
        run = store_of_run(open_store(values, rank, limit_s))
        live_run = None if find_live_run is None else find_live_run(left_contacts(run))
        if live_run is not None:
            alone = open_watch(None, 0, values, timeout_s, under_agent=under_agent)
            return cls(own_rank, 1, local_rank, timeout_s, watch=alone, live_run=live_run, run_store=run)
        number = arrive(run, Seat.of_this_process(rank, own_rank), nodes, world_size, limit_s + arrival_s)
        store = store_of_try(run, number)
        watch = open_watch(run, number, values, timeout_s, under_agent=under_agent) if process_groups else None
        held = holds_store(values, rank)
        context = cls(own_rank, world_size, local_rank, timeout_s, store, held, watch, run_store=run)
        if process_groups:
            context._initialise(limit_s)
        return context

    def meet(self, topic: Topic, own: str, limit_s: float | None = None) -> list[str]:
        """Tell all ranks a text and return what each of them says, in rank order. All ranks call this together.

        Raises `CommunicationError` where one says nothing within `limit_s` (default: the timeout).
        """
        if self.store is None:
            return [own]
        store, limit_s = self.store, limit_s or self.timeout_s
        self._meeting = f"{topic.value}/{self._meetings[topic]}"
        self._meetings[topic] += 1
        keys = [f"{self._meeting}/{rank}" for rank in range(self.world_size)]

        def exchange() -> list[str]:
            store.set(keys[self.rank], own)
            deadline_s = time.monotonic() + limit_s
            while not store.check(keys):
                self.check()
                if time.monotonic() > deadline_s:
                    silent = ", ".join(f"rank {rank}" for rank, key in enumerate(keys) if not store.check([key]))
                    raise RuntimeError(f"{silent} said nothing within {limit_s:g} s")
                time.sleep(time_limits.STORE_POLL_S)
            texts = [value.decode() for value in store.multi_get(keys)]  # far hosts ask once, not for each
            store.add(f"{self._meeting}/read", 1)
            return texts

        action = f"rank {self.rank} waited to hear from all {self.world_size} ranks ({topic}) in vain"
        return raising_outside(exchange, lambda cause: CommunicationError(f"{action}: {cause}"))

    def check(self) -> None:
        """Raise the error with which this process has to end, because the others or the launcher are gone.

        It is an `EpochEndedError` where the members that are left go on in another epoch.
        """
        if self.watch is not None:
            self.watch.check()
        if self.membership is not None and self.membership.ending is not None:
            raise EpochEndedError(self.membership.ending)

    @property
    def may_write(self) -> bool:
        """Whether this process may still write what others read: not where they may have gone on without it."""
        return self.membership is None or self.membership.may_write

    def leave_meeting(self, *, heard: bool = False) -> None:
        """Say that this process ends and all others do, by what was said in the last meeting.

        With `heard` it stays until all have read that. The one that holds the store stays until all have left. But
        nobody stays for long.
        """
        if self.store is None or not self._meeting:
            return
        try:
            if heard and not self.holds_store:
                self._wait_for_all(self.store, "read")
            self.store.add(f"{self._meeting}/left", 1)
            if self.holds_store:
                self._wait_for_all(self.store, "left")
        except RuntimeError:
            return

    def _wait_for_all(self, store: Store, what: str) -> None:
        """Wait until all ranks have counted themselves, for a moment at most."""
        deadline_s = time.monotonic() + time_limits.LAST_WORDS_S
        while store.add(f"{self._meeting}/{what}", 0) < self.world_size and time.monotonic() < deadline_s:
            time.sleep(time_limits.STORE_POLL_S)

    def let_end(self) -> None:
        """Heed the other ranks no more: an error ends this process, which may finish what it writes."""
        if self.watch is not None:
            self.watch.let_end()

    def finish(self) -> None:
        """Wait until all ranks have done what they need each other for; then connections may close. All call this.

        Without it one that is quick closes connections on which another one still waits. Whoever is lost now has done
        its work.
        """
        with suppress(EpochEndedError):
            self.meet(Topic.END, "")
        if self.watch is not None:
            self.watch.close()
        self.leave_meeting(heard=True)

    def enter_epoch(self, rank: int, world_size: int, store: Store) -> None:
        """Leave all process groups and meet the members of a new epoch, in the store that lasts as long as it does.

        Raises `CommunicationError` where one of them does not come.
        """
        if dist.is_initialized():
            dist.destroy_process_group()
        # Where a member could not connect, torch has counted a group all the same: without this the groups of the next
        # epoch would have other names there than with those that could, and all would wait for each other.
        dist.distributed_c10d._world.group_count = 0
        self.rank, self.world_size, self.store, self.holds_store = rank, world_size, store, False
        self._meetings.clear()
        self._meeting = ""
        if self.watch is not None:
            self.watch.follow(store)
        self._initialise(self.timeout_s)

    def close(self) -> None:
        """Leave the process group; safe to call twice."""
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.watch is not None:
            self.watch.close()
        self.store = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; where an error ends this process, tell the other ranks first."""
        if error is not None:
            self._say_ended(error)
        self.close()

    def _initialise(self, limit_s: float) -> None:
        """Initialise torch.distributed on gloo.

        All pairs of ranks connect at once: with lazy connections the first irecv of a pair blocks until its peer posts
        too, and ranks that post receives ahead would wait for each other.
        """
        os.environ["TORCH_GLOO_LAZY_INIT"] = "0"
        timeout = timedelta(seconds=limit_s)
        init = partial(dist.init_process_group, "gloo", store=self.store, timeout=timeout)
        raising_outside(
            lambda: init(rank=self.rank, world_size=self.world_size),
            lambda cause: CommunicationError(
                f"rank {self.rank} of {self.world_size} could not connect to all others within {limit_s:g} s: {cause}; "
                "check that every host reaches every other one on any port, and GLOO_SOCKET_IFNAME where a host has "
                "several interfaces"
            ),
            kinds=(RuntimeError, ValueError),
        )

    def _say_ended(self, error: BaseException) -> None:
        """Tell the other ranks that this one ends by itself. Who lost another one does not wait for an answer."""
        if self.watch is not None:
            self.watch.close()
        if self.store is not None and self.membership is None:
            stay = not isinstance(error, CommunicationError)
            say_ended(self.store, self.rank, error_content(error), self.world_size, stay=stay)


def _rank_of_node(values: Mapping[str, str], nodes: Sequence[str], rank: int) -> int:
    name = values.get("SKIPPIPE_NODE")
    if not name or not nodes:
        return rank
    if name not in nodes:
        raise ConfigError(f"SKIPPIPE_NODE: the cluster has no node {name!r}; it has {', '.join(nodes)}")
    return nodes.index(name)
