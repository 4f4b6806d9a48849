"""The problem by slot: a slot is a place for one replica of one stage, and a placement says which node
fills it.

Routes name slots, so they stay what they are when two nodes change places; only the costs move.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import numpy.typing as npt

from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.problem.sequences.listed_sequences import stage_sequences
from skippipe_scheduler.problem.sequences.sampled_sequences import sample_sequences

MAX_SEQUENCES = 2000
"""Legal sequences of stages up to which all are listed. Chosen: with more, models over them get slow."""
SlotPlacement = tuple[int, ...]
"""Index (rank) of the node in each slot; slots are numbered stage by stage."""
SlotRoute = tuple[int, ...]
"""Slots that one microbatch visits, origin first."""


@dataclass(frozen=True)
class SlotModel:
    """A problem by slot, before any node is placed: what does not depend on which node fills which slot.

    Stages, slots and sequences follow from the problem once and are remembered; `SlotCosts` adds the costs under one
    placement.
    """

    problem: Problem

    @cached_property
    def stage_of(self) -> tuple[int, ...]:
        """Stage of each slot."""
        return tuple(stage for stage, size in enumerate(self.problem.sizes) for _ in range(size))

    @cached_property
    def slots_of(self) -> tuple[tuple[int, ...], ...]:
        """Slots of each stage."""
        return tuple(
            tuple(slot for slot, held in enumerate(self.stage_of) if held == stage)
            for stage in range(self.problem.num_stages)
        )

    @cached_property
    def _first_sequences(self) -> tuple[tuple[int, ...], ...]:
        return tuple(islice(stage_sequences(self.problem.rules), MAX_SEQUENCES + 1))

    @cached_property
    def sequences(self) -> tuple[tuple[int, ...], ...]:
        """Every legal order of stages, or many that cover all stages where there are more than `MAX_SEQUENCES`."""
        return self._first_sequences if self.lists_all_sequences else sample_sequences(self.problem.rules)

    @property
    def lists_all_sequences(self) -> bool:
        """Whether `sequences` are all there are."""
        return len(self._first_sequences) <= MAX_SEQUENCES

    @cached_property
    def longest(self) -> int:
        """Stages on the longest route."""
        return self.problem.rules.route_length

    @cached_property
    def origins(self) -> tuple[int, ...]:
        """Origin slot of every microbatch to begin with; ids go origin by origin."""
        counts = self.problem.microbatches_of_origins()
        return tuple(origin for origin, count in enumerate(counts) for _ in range(count))

    @cached_property
    def num_tasks(self) -> int:
        """Tasks of all microbatches."""
        counts = self.problem.rules.length_counts(len(self.origins))
        return sum(count * (2 * length + 1) for length, count in counts.items())

    @cached_property
    def coverage(self) -> tuple[tuple[int, int], ...]:
        """Least and greatest number of visits that the rules allow each stage."""
        return self.problem.rules.coverage(len(self.origins))

    @cached_property
    def limits(self) -> dict[int, tuple[int, int]]:
        """The same for the stages behind 0 for which it is a limit."""
        return self.problem.rules.limits(len(self.origins))

    @cached_property
    def pinned(self) -> tuple[int, ...]:
        """Stage at which each node (rank) is pinned, or -1."""
        pins = self.problem.pinned or {}
        return tuple(pins.get(node, -1) for node in self.problem.nodes)

    @cached_property
    def transfer_s(self) -> npt.NDArray[np.float64]:
        """Seconds of a transfer from node to node, by rank, (N, N); 0 from a node to itself."""
        return self._by_rank(self.problem.costs.transfer_s)

    @cached_property
    def latency_s(self) -> npt.NDArray[np.float64]:
        """The same of its latency; 0 where the problem gives none."""
        return self._by_rank(self.problem.costs.latency_s)

    @cached_property
    def gbit_per_s(self) -> npt.NDArray[np.float64]:
        """Bandwidth from node to node, by rank, (N, N); 0 where the problem gives none."""
        return self._by_rank(self.problem.costs.gbit_per_s)

    def _by_rank(self, table: Mapping[str, Mapping[str, float]] | None) -> npt.NDArray[np.float64]:
        names = self.problem.nodes
        if table is None:
            return np.zeros((len(names), len(names)))
        return np.array([[0.0 if source == sink else table[source][sink] for sink in names] for source in names])

    @property
    def shares_capacity(self) -> bool:
        """Whether transfers over different links share cards or uplinks."""
        return self.problem.costs.contention in ("node", "shared")

    def given_placement(self) -> SlotPlacement | None:
        """Return the placement that the problem fixes, if it does."""
        if self.problem.stages is None:
            return None
        rank = {node: index for index, node in enumerate(self.problem.nodes)}
        return tuple(rank[node] for stage in self.problem.stages for node in stage.nodes)

    def stages(self, placement: SlotPlacement) -> tuple[tuple[str, ...], ...]:
        """Return the node names of each stage."""
        return tuple(tuple(self.problem.nodes[placement[slot]] for slot in slots) for slots in self.slots_of)

    def covers(self, routes: Sequence[SlotRoute]) -> bool:
        """Return whether `routes` visit every stage as often as the rules ask for."""
        visits = [0] * self.problem.num_stages
        for route in routes:
            for slot in route:
                visits[self.stage_of[slot]] += 1
        return all(low <= count <= high for count, (low, high) in zip(visits, self.coverage, strict=True))


class SlotCosts:
    """Costs by slot under one placement, in plain lists because the search reads them in its inner loop."""

    def __init__(self, slot_model: SlotModel, placement: SlotPlacement) -> None:
        problem, costs = slot_model.problem, slot_model.problem.costs
        names = [problem.nodes[rank] for rank in placement]
        weights = [problem.stage_weight[stage] for stage in slot_model.stage_of]
        self.slot_model = slot_model
        self.placement = placement
        self.forward_s = [costs.forward_s[n] * w for n, w in zip(names, weights, strict=True)]
        self.backward_s = [costs.backward_s[n] * w for n, w in zip(names, weights, strict=True)]
        self.loss_s = [costs.loss_s[name] for name in names]
        self.memory = [costs.memory[name] for name in names]
        self.overhead_s = costs.task_overhead_s
        self.transfer_s: list[list[float]] = slot_model.transfer_s[np.ix_(placement, placement)].tolist()
        self.reduce_s = problem.reduce_s(slot_model.stages(placement))
        self._chains: dict[SlotRoute, Chain] = {}

    def chain(self, route: SlotRoute) -> "Chain":
        """Return the tasks of one microbatch on `route` (remembered)."""
        found = self._chains.get(route)
        if found is None:
            found = self._chains[route] = Chain(self, route)
        return found

    def weight_s(self) -> dict[str, float] | None:
        """Return the weight gradient's part of `backward_s` by node, where the problem gives one."""
        problem = self.slot_model.problem
        given = problem.costs.weight_s
        if given is None:
            return None
        stage_of = {
            problem.nodes[rank]: stage for rank, stage in zip(self.placement, self.slot_model.stage_of, strict=True)
        }
        return {node: taken_s * problem.stage_weight[stage_of[node]] for node, taken_s in given.items()}

    def both_ways_s(self, source: int, sink: int) -> float:
        """Return the seconds of a hop forward and, later, backward."""
        return self.transfer_s[source][sink] + self.transfer_s[sink][source]


class Chain:
    """The 2P+1 tasks of a microbatch: P forwards, the loss, P backwards; lists have one entry per task."""

    def __init__(self, costs: SlotCosts, route: SlotRoute) -> None:
        length = len(route)
        self.slots = (*route, route[0], *reversed(route))
        self.durations_s = [
            *(costs.forward_s[slot] for slot in route),
            costs.loss_s[route[0]],
            *(costs.backward_s[slot] for slot in reversed(route)),
        ]
        self.delays_s = [
            *(costs.transfer_s[a][b] for a, b in zip(self.slots, self.slots[1:], strict=False)),
            0.0,
        ]
        self.previous = [*(-1,) * length, 0, *range(length - 1, 0, -1), length]
        """Earlier task of the same microbatch on the same slot, or -1."""
        starts, now_s = [], 0.0
        for duration_s, delay_s in zip(self.durations_s, self.delays_s, strict=True):
            starts.append(now_s)
            now_s += duration_s + delay_s
        self.round_trip_s = now_s
        self.residence_s = [
            starts[2 * length - hop] + self.durations_s[2 * length - hop] - starts[hop] for hop in range(length)
        ]
        """Shortest time that a microbatch is held at each hop."""
