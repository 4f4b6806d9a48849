"""Which process holds which stages, and which of a stage's replicas serves."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from skippipe.errors import InputError
from skippipe.inference.inference_run import InferenceRun, stages_without
from skippipe_scheduler.plan.plan import Plan

TransferSeconds = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class StageAssignment:
    """What each rank is called and the stages it holds, both in rank order."""

    names: tuple[str, ...]
    stages_of: tuple[tuple[int, ...], ...]
    transfer_s: TransferSeconds = field(default_factory=dict)
    """Seconds of a transfer by source and destination; 0 where not known."""
    named: bool = True
    """Whether names are those of nodes of a plan."""

    @property
    def drivers(self) -> Sequence[int]:
        """Ranks with stage 0. The first that is there drives: it embeds, samples and prints."""
        return [rank for rank, stages in enumerate(self.stages_of) if 0 in stages]

    def driver(self, lost: Collection[int] = ()) -> int | None:
        """Return the rank that drives the others without the `lost` ones; None where nobody can."""
        return next((rank for rank in self.drivers if rank not in lost), None)

    def holders(self, lost: Collection[int] = ()) -> dict[int, int]:
        """Return the rank that serves each stage without the `lost` ones; a stage that nobody holds is not there.

        Of all choices of replicas, the one with the shortest way through all stages and back to the driver.
        """
        driver = self.driver(lost)
        if driver is None:
            return {}
        ways: dict[int, tuple[float, dict[int, int]]] = {driver: (0.0, {0: driver})}
        for stage in range(1, 1 + max(max(stages, default=0) for stages in self.stages_of)):
            ranks = [rank for rank, stages in enumerate(self.stages_of) if stage in stages and rank not in lost]
            if ranks:
                ways = {rank: self._extended(ways, rank, stage) for rank in ranks}
        return min(((way[0] + self._seconds(rank, driver), way[1]) for rank, way in ways.items()), key=_length)[1]

    def _extended(
        self, ways: Mapping[int, tuple[float, dict[int, int]]], rank: int, stage: int
    ) -> tuple[float, dict[int, int]]:
        reached = [(length + self._seconds(last, rank), way) for last, (length, way) in ways.items()]
        length, way = min(reached, key=_length)
        return length, {**way, stage: rank}

    def _seconds(self, source: int, destination: int) -> float:
        return self.transfer_s.get(self.names[source], {}).get(self.names[destination], 0.0)


def assign_stages(run: InferenceRun, claims: Sequence[str | None], absent: Collection[str]) -> StageAssignment:
    """Return who plays what among the ranks that are there, of which each may claim to be a node of the plan.

    Ranks that claim nothing are the plan's nodes in order where there are as many of them as of nodes, with or without
    those that are absent; else the stages that are left are dealt out evenly. Raises `InputError` where the claims
    contradict each other or the plan, and where stage 0 is held by nobody.
    """
    if any(claims):
        return _by_claims(run, claims, absent)
    gone = stages_without(run.stage_nodes, absent)
    if run.plan is not None:
        present = tuple(node for node in run.plan.nodes if node not in absent)
        for names in (present, run.plan.nodes):
            if len(names) == len(claims):
                return _of_nodes(run.plan, names, absent)
    return _dealt([stage for stage in range(len(run.bounds)) if stage not in gone], len(claims))


def _by_claims(run: InferenceRun, claims: Sequence[str | None], absent: Collection[str]) -> StageAssignment:
    names = tuple(claim or "" for claim in claims)
    if run.plan is None:
        raise InputError("SKIPPIPE_NODE names a node of the run's plan; leave --stages out, or unset it")
    for rank, name in enumerate(names):
        if name not in run.plan.nodes:
            known = ", ".join(run.plan.nodes)
            raise InputError(f"SKIPPIPE_NODE of rank {rank}: the plan has no node {name!r}; it has {known}")
        if name in names[:rank]:
            raise InputError(f"SKIPPIPE_NODE: ranks {names.index(name)} and {rank} are both {name!r}")
    missing = {node for node in run.plan.nodes if node not in names}
    stages_without(run.stage_nodes, missing | set(absent))
    return _of_nodes(run.plan, names, absent)


def _of_nodes(plan: Plan, names: tuple[str, ...], absent: Collection[str]) -> StageAssignment:
    stages_of = tuple(() if name in absent else (plan.stage_of[name],) for name in names)
    return StageAssignment(names, stages_of, plan.costs.transfer_s)


def _dealt(stages: Sequence[int], world_size: int) -> StageAssignment:
    """Deal neighbouring stages to each rank; where there are more ranks than stages, some hold the same one."""
    names = tuple(f"rank {rank}" for rank in range(world_size))
    count = len(stages)
    if world_size > count:
        return StageAssignment(names, tuple((stages[rank % count],) for rank in range(world_size)), named=False)
    edges = [rank * count // world_size for rank in range(world_size + 1)]
    dealt = tuple(tuple(stages[first:last]) for first, last in pairwise(edges))
    return StageAssignment(names, dealt, named=False)


def _length(way: tuple[float, dict[int, int]]) -> float:
    return way[0]
