"""The process groups of one plan. Each has its own connections, so a long activation never delays a control message."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from skippipe.errors import CommunicationError
from skippipe.runtime.program.program import Opcode, Program
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.torch_errors import raising_outside, translating_errors
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.simulate import Direction

ABORT_TAG = 2**31 - 1
"""The highest that gloo has, so that no message bears it."""


@dataclass
class ProcessGroups:
    """Forward transfers, backward transfers, control, and the replicas of this rank's stage (None if it has one)."""

    rank: int
    forward: dist.ProcessGroup
    backward: dist.ProcessGroup
    control: dist.ProcessGroup
    replicas: dist.ProcessGroup | None
    replica_ranks: tuple[int, ...]
    regions: tuple[tuple[int, ...], ...] = ()
    """Ranks within the group `replicas` that are of one region, in the order of the stage's nodes."""

    def abort(self) -> None:
        """Make every wait on these groups fail at once, here and at the peers.

        gloo closes all of a group's connections when a wait times out, so one is let time out. Nothing else releases
        a thread that waits for a peer that is alive. A wait for one that is dead fails at once and closes nothing, so
        every peer has its turn.
        """
        everyone = range(dist.get_world_size())
        for group, ranks in (
            (self.forward, everyone),
            (self.backward, everyone),
            (self.control, everyone),
            (self.replicas, self.replica_ranks),
        ):
            if group is not None:
                for rank in ranks:
                    if rank != self.rank:
                        _abort_gloo(group, rank)

    def destroy(self) -> None:
        """Release the groups."""
        for group in (self.forward, self.backward, self.control, self.replicas):
            if group is not None:
                dist.destroy_process_group(group)


class Channels:
    """One process group for each directed pair of ranks and direction that programs use, for backends without tags.

    All ranks extend the channels together with the same programs: groups are made, and their first message is sent,
    in one order that is the same everywhere, because the first use of a channel connects it and both ends have to be
    there. (Groups made by their members alone would be named after how many groups each of them has already, which
    differs between ranks.)
    """

    def __init__(self, rank: int, timeout_s: float, backend: str, device: torch.device) -> None:
        self.timeout_s = timeout_s
        self._rank = rank
        self._backend = backend
        self._device = device
        self._known: set[tuple[int, int, Direction]] = set()
        self._groups: dict[tuple[int, int, Direction], dist.ProcessGroup] = {}

    def extend(self, programs: Sequence[Program]) -> None:
        """Create the channels of `programs` that are not there yet, and send one number through each."""
        used = {
            (program.rank, send.peer, send.direction) for program in programs for send in program.select(Opcode.SEND)
        }
        for key in sorted(used - self._known):
            source, destination, _ = key
            others = tuple(rank for rank in (source, destination) if rank != self._rank)
            translating_errors(f"connected rank {source} to rank {destination}", others, partial(self._connect, key))
        self._known |= used

    def _connect(self, key: tuple[int, int, Direction]) -> None:
        source, destination, _ = key
        timeout = timedelta(seconds=self.timeout_s)
        group = dist.new_group([source, destination], timeout=timeout, backend=self._backend)
        if self._rank in (source, destination):
            self._groups[key] = group
            self._use(group, source, destination)

    def group(self, source: int, destination: int, direction: Direction) -> dist.ProcessGroup:
        """Return the group of one channel of this rank."""
        return self._groups[source, destination, direction]

    def abort(self) -> None:
        """Make every wait on the channels fail at once; see `ProcessGroups`."""
        for (source, destination, _), group in self._groups.items():
            if self._backend == "nccl":
                _abort_nccl(group, self._device)
            else:
                _abort_gloo(group, destination if self._rank == source else source)

    def destroy(self) -> None:
        """Release the groups."""
        for group in self._groups.values():
            dist.destroy_process_group(group)
        self._groups.clear()
        self._known.clear()

    def _use(self, group: dist.ProcessGroup, source: int, destination: int) -> None:
        number = torch.zeros(1, device=self._device)
        if self._rank == source:
            dist.send(number, destination, group=group)
        else:
            dist.recv(number, source, group=group)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def create_groups(plan: Plan, rank: int, timeout_s: float) -> ProcessGroups:
    """Create the groups of a plan; all ranks call this at the same time with the same plan.

    Raises `CommunicationError` where one of them is lost meanwhile.
    """
    return raising_outside(
        lambda: _create_groups(plan, rank, timedelta(seconds=timeout_s)),
        lambda cause: CommunicationError(f"rank {rank} could not connect to all others: {cause}"),
        kinds=(RuntimeError, ValueError),
    )


def _create_groups(plan: Plan, rank: int, timeout: timedelta) -> ProcessGroups:
    def new_group(ranks: list[int] | None = None) -> dist.ProcessGroup:
        group: dist.ProcessGroup = dist.new_group(ranks, timeout=timeout, backend="gloo")
        return group

    forward, backward, control = new_group(), new_group(), new_group()
    replicas = None
    replica_ranks: tuple[int, ...] = (rank,)
    regions: tuple[tuple[int, ...], ...] = ()
    for stage in plan.stages:
        ranks = sorted(plan.rank_of[node] for node in stage.nodes)
        group = new_group(ranks) if len(ranks) > 1 else None
        if rank in ranks:
            replicas, replica_ranks = group, tuple(ranks)
            regions = by_region(plan, stage.nodes, ranks)
    return ProcessGroups(rank, forward, backward, control, replicas, replica_ranks, regions)


def by_region(plan: Plan, nodes: Sequence[str], ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return the places in `ranks` of the nodes of each region; all are of one where the plan names none."""
    region_of = dict(zip(plan.nodes, plan.regions or (), strict=False))
    places: dict[str, list[int]] = {}
    for node in nodes:
        places.setdefault(region_of.get(node, ""), []).append(ranks.index(plan.rank_of[node]))
    return tuple(map(tuple, places.values()))


def _abort_gloo(group: dist.ProcessGroup, peer: int) -> None:
    try:
        work = dist.irecv(torch.empty(1), peer, group=group, tag=ABORT_TAG)
        if work is not None:
            work.wait(timedelta(seconds=time_limits.ABORT_S))
    except RuntimeError:
        return


def _abort_nccl(group: dist.ProcessGroup, device: torch.device) -> None:
    """Stop NCCL's kernels, which would keep the device busy for as long as their peer does not come."""
    try:
        group._get_backend(device).abort()
    except RuntimeError:
        return
