"""The low level of conflict-based search: the cheapest path of one agent under its constraints, by A*.

A path's cost is its forward with waits, the loss, and its backward without (arXiv 2502.19913, the section on finding
paths). Every hop is charged both ways when it is made, so that the way home is known at each step. The estimate of the
rest is the cheapest visit times the stages still to visit. Of two ways to the same node through the same stages only
the cheaper one is followed, which is exact where no window makes the agent wait.
"""

import heapq
from dataclasses import dataclass, field
from itertools import count

from skippipe_scheduler.baselines.paper_method.agents import Agent
from skippipe_scheduler.slots.slot_model import SlotCosts, SlotRoute

MAX_LABELS = 50_000
"""Paths under construction after which a search gives up; many stages can be visited in very many orders. Chosen: about
a second."""

Window = tuple[int, float, float]
"""A slot and the seconds between which an agent may not compute a forward there."""


@dataclass(frozen=True)
class Constraints:
    """What conflicts have taught about one agent.

    `stages`, where given, are exactly those to visit. An agent waits out each of the `windows`.
    """

    forbidden_slots: frozenset[int] = frozenset()
    windows: frozenset[Window] = frozenset()
    stages: frozenset[int] | None = None


@dataclass(frozen=True)
class Path:
    """A route, its cost in seconds, and when each of its tasks starts if the agent waits for nobody else."""

    cost_s: float
    route: SlotRoute
    starts: tuple[float, ...] = field(compare=False)


@dataclass(frozen=True)
class _Label:
    """A path under construction: `forward_s` is the clock after its last forward, `home_s` what is owed behind it."""

    slots: SlotRoute
    swaps: int
    forward_s: float
    home_s: float
    starts: tuple[float, ...]


class PathFinder:
    """Finds paths; remembers what it was asked before."""

    def __init__(self, costs: SlotCosts, stays_s: float) -> None:
        """`stays_s` microbatches' worth of time is what an agent takes at each node (its size in one wave)."""
        self.costs = costs
        self.factor = stays_s
        self._known: dict[tuple[int, int, Constraints], Path | None] = {}
        work = [f + b for f, b in zip(costs.forward_s, costs.backward_s, strict=True)]
        self.least_visit_s = min(
            (stays_s * work[b] + costs.both_ways_s(a, b) for a in range(len(work)) for b in range(len(work)) if a != b),
            default=0.0,
        )

    def find(self, agent: Agent, constraints: Constraints) -> Path | None:
        """Return the cheapest path, or None where the constraints leave none (or too many to look through)."""
        key = (agent.origin, agent.length, constraints)
        if key not in self._known:
            self._known[key] = self._search(agent, constraints)
        return self._known[key]

    def _search(self, agent: Agent, constraints: Constraints) -> Path | None:
        costs, tie = self.costs, count()
        start_s = _after_windows(0.0, agent.origin, self._stay_s(agent.origin), constraints)
        backward_s = self.factor * costs.backward_s[agent.origin]
        first = _Label((agent.origin,), 0, start_s + self._stay_s(agent.origin), backward_s, (start_s,))
        heap = [(0.0, next(tie), first)]
        done: set[tuple[int, frozenset[int], int, bool]] = set()
        while heap:
            _, number, label = heapq.heappop(heap)
            closed = len(label.slots) == agent.length
            state = (label.slots[-1], frozenset(costs.slot_model.stage_of[s] for s in label.slots), label.swaps, closed)
            if closed:
                return self._path(label)
            if state in done:
                continue
            done.add(state)
            if number > MAX_LABELS:
                return None
            for longer in self._extensions(agent, label, constraints):
                heapq.heappush(heap, (self._estimate_s(agent, longer), next(tie), longer))
        return None

    def _stay_s(self, slot: int) -> float:
        return self.factor * self.costs.forward_s[slot]

    def _estimate_s(self, agent: Agent, label: _Label) -> float:
        rest = agent.length - len(label.slots)
        way_home_s = self.costs.both_ways_s(label.slots[-1], agent.origin) if rest == 0 else 0.0
        return label.forward_s + label.home_s + rest * self.least_visit_s + way_home_s

    def _extensions(self, agent: Agent, label: _Label, constraints: Constraints) -> list[_Label]:
        costs, found = self.costs, []
        last = label.slots[-1]
        for stage, swaps in self._next_stages(agent, label, constraints):
            for slot in costs.slot_model.slots_of[stage]:
                if slot in constraints.forbidden_slots:
                    continue
                arrival_s = label.forward_s + costs.transfer_s[last][slot]
                start_s = _after_windows(arrival_s, slot, self._stay_s(slot), constraints)
                home_s = label.home_s + costs.transfer_s[slot][last] + self.factor * costs.backward_s[slot]
                ahead = (*label.slots, slot)
                found.append(_Label(ahead, swaps, start_s + self._stay_s(slot), home_s, (*label.starts, start_s)))
        return found

    def _next_stages(self, agent: Agent, label: _Label, constraints: Constraints) -> list[tuple[int, int]]:
        """Return the stages that may come next (rules of `rules.py`), with the swaps there are then.

        A stage that has to be visited is passed over only where there is a swap left to come back to it.
        """
        rules, visited = self.costs.slot_model.problem.rules, [self.costs.slot_model.stage_of[s] for s in label.slots]
        found = []
        wanted = set(rules.protected_stages if constraints.stages is None else constraints.stages).difference(visited)
        frontier = max(visited)
        for stage in range(1, min(rules.num_stages, frontier + rules.max_forward_jump + 1)):
            unwanted = constraints.stages is not None and stage not in constraints.stages
            unwanted |= len(wanted - {stage}) > agent.length - len(visited) - 1
            if unwanted or stage in visited:
                continue
            reached, swaps = max(frontier, stage), label.swaps + (stage < frontier)
            passed = [other for other in wanted if other < reached and other != stage]
            is_near = reached - min([stage, *passed]) <= rules.max_swap_distance
            if is_near and swaps + len(passed) <= rules.max_swaps:
                found.append((stage, swaps))
        return found

    def _path(self, label: _Label) -> Path:
        """Add loss and backward to a finished forward."""
        costs, route = self.costs, label.slots
        now_s = label.forward_s + costs.transfer_s[route[-1]][route[0]]
        starts = [*label.starts, now_s]
        now_s += self.factor * costs.loss_s[route[0]]
        for before, slot in zip((route[0], *reversed(route)), reversed(route), strict=False):
            now_s += costs.transfer_s[before][slot]
            starts.append(now_s)
            now_s += self.factor * costs.backward_s[slot]
        return Path(now_s, route, tuple(starts))


def _after_windows(arrival_s: float, slot: int, stay_s: float, constraints: Constraints) -> float:
    """Return when a forward can start that arrives then and must not overlap the agent's windows at the slot."""
    start_s = arrival_s
    for held, begin_s, end_s in sorted(constraints.windows):
        if held == slot and begin_s < start_s + stay_s and start_s < end_s:
            start_s = end_s
    return start_s
