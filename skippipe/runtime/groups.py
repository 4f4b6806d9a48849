"""The process groups of one plan. Each has its own connections, so a long activation never delays a control message."""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from skippipe_scheduler.plan import Plan

POISON_TAG = 2**31 - 1


@dataclass
class ProcessGroups:
    """Forward transfers, backward transfers, control, and the replicas of this rank's stage (None if it has one)."""

    rank: int
    forward: dist.ProcessGroup
    backward: dist.ProcessGroup
    control: dist.ProcessGroup
    replicas: dist.ProcessGroup | None
    replica_ranks: tuple[int, ...]

    def poison(self) -> None:
        """Make every wait on these groups fail at once, here and at the peers.

        gloo closes all of a group's connections when a wait times out. Nothing else releases a thread that waits
        for a peer that is alive.
        """
        everyone = range(dist.get_world_size())
        for group, ranks in (
            (self.forward, everyone),
            (self.backward, everyone),
            (self.control, everyone),
            (self.replicas, self.replica_ranks),
        ):
            if group is not None:
                _poison(group, next(rank for rank in ranks if rank != self.rank))

    def destroy(self) -> None:
        """Release the groups."""
        for group in (self.forward, self.backward, self.control, self.replicas):
            if group is not None:
                dist.destroy_process_group(group)


def create_groups(plan: Plan, rank: int, timeout_s: float) -> ProcessGroups:
    """Create the groups of a plan; all ranks call this at the same time with the same plan."""
    timeout = timedelta(seconds=timeout_s)

    def new_group(ranks: list[int] | None = None) -> dist.ProcessGroup:
        group: dist.ProcessGroup = dist.new_group(ranks, timeout=timeout, backend="gloo")
        return group

    forward, backward, control = new_group(), new_group(), new_group()
    replicas = None
    replica_ranks: tuple[int, ...] = (rank,)
    for stage in plan.stages:
        ranks = sorted(plan.rank_of[node] for node in stage.nodes)
        group = new_group(ranks) if len(ranks) > 1 else None
        if rank in ranks:
            replicas, replica_ranks = group, tuple(ranks)
    return ProcessGroups(rank, forward, backward, control, replicas, replica_ranks)


def _poison(group: dist.ProcessGroup, peer: int) -> None:
    try:
        work = dist.irecv(torch.empty(1), peer, group=group, tag=POISON_TAG)
        if work is not None:
            work.wait(timedelta(milliseconds=1))
    except RuntimeError:
        return
