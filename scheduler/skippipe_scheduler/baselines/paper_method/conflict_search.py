"""Conflict-based search over the paths of all agents (SkipPipe, arXiv 2502.19913; Sharon et al. 2015 for the method).

Every agent first takes its cheapest path. Where paths conflict, an agent is constrained and its path found anew. The
three kinds of conflict are resolved one after another, as in the authors' code:

1. A stage is visited more often than uniform coverage allows: it is forbidden to as many agents as are too many. Up to
   three children, which differ in who gives way. The stages of each agent are then kept.
2. A node serves more microbatches than its memory allows in the waves there are: it is forbidden to as many agents.
3. Two agents are at a node at the same time: one waits until the other is done. Backwards never wait; of two forwards
   the cheaper agent's waits, and also the other's if that one belongs to the slower half.

Left open by the paper, and chosen here: who gives way in kinds 1 and 2 are those with the cheapest detours first (the
authors' code takes the slowest agents in kind 2, and one child; cheapest first finds better sets). Nodes of the search
are taken by largest path cost plus a small penalty for each conflict left. Where kind 1 leaves no solution, the stages
come from the count model of `routes.py`; where kind 2 leaves none, the paths stay as they are, because memory delays
the microbatches of such a plan but does not forbid it. Limits of the search double from round to round (`effort`).
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise
from math import ceil

from skippipe_scheduler.baselines.paper_method.agents import Agent, wave_of
from skippipe_scheduler.baselines.paper_method.paths import Constraints, Path, PathFinder, Window
from skippipe_scheduler.budget import Budget
from skippipe_scheduler.slots.routes import balanced_sequences
from skippipe_scheduler.slots.slot_model import SlotCosts, SlotRoute

_MAX_CHILDREN = 3
"""Ways to resolve one conflict that are tried. Chosen: the paper does not say, as for the next four."""
_STAGE_SOLUTIONS = 16
"""Nodes without conflicts of kind 1 or 2 that are kept, times the effort."""
_SOLUTIONS = 8
"""Nodes without any conflict that are looked for, times the effort."""
_KIND_SHARE = 0.3
"""Share of what is left of the budget for conflicts of kind 1, and again for those of kind 2."""
_PENALTY = 0.01
"""Share of the largest path cost that a conflict adds to a node's priority."""


@dataclass(frozen=True)
class _Node:
    """One node of the search tree: constraints and path of each agent."""

    constraints: tuple[Constraints, ...]
    paths: tuple[Path, ...]


def path_sets(
    costs: SlotCosts, agents: Sequence[Agent], budget: Budget, seed: int, effort: int = 1
) -> Iterator[tuple[SlotRoute, ...]]:
    """Yield one route per agent, again and again, first such that still collide; every set obeys coverage.

    The steps of `budget` are expansions. Yields nothing where the budget ends before the first set, or where the agents
    cannot cover the stages evenly.
    """
    search = _ConflictSearch(costs, tuple(agents), budget, effort)
    relaxed = search.slot_solutions(search.stage_solutions(seed))
    for node in relaxed:
        yield tuple(path.route for path in node.paths)
    for node in search.without_collisions(relaxed):
        yield tuple(path.route for path in node.paths)


class _ConflictSearch:
    def __init__(self, costs: SlotCosts, agents: tuple[Agent, ...], budget: Budget, effort: int) -> None:
        self.costs, self.agents, self.budget, self.effort = costs, agents, budget, effort
        self.size = agents[0].size
        self.wave = wave_of(costs, agents)
        self.finder = PathFinder(costs, ceil(self.size / self.wave.num_waves))
        self.ties = count()

    def stage_solutions(self, seed: int) -> list[_Node]:
        """Resolve conflicts of kind 1, best first; return the nodes that are left without them, stages kept."""
        root = self._with((Constraints(),) * len(self.agents))
        share = self.budget.share(_KIND_SHARE)
        solved = self._resolved([root] if root else [], self._stage_overload, share, _STAGE_SOLUTIONS * self.effort)
        self.budget.charge(share)
        return [self._with_stages_kept(node) for node in solved] or self._counted_stages(seed)

    def slot_solutions(self, nodes: Sequence[_Node]) -> list[_Node]:
        """Resolve conflicts of kind 2, best first; return `nodes` as they came where that cannot be done."""
        share = self.budget.share(_KIND_SHARE)
        solved = self._resolved(nodes, self._slot_overload, share, _STAGE_SOLUTIONS * self.effort)
        self.budget.charge(share)
        return solved or list(nodes)

    def _resolved(self, nodes: Sequence[_Node], overload: "_FindOverload", budget: Budget, limit: int) -> list[_Node]:
        """Expand nodes best first until `limit` have no overload."""
        heap = [(self._priority_s(node, overload(node)), next(self.ties), node) for node in nodes]
        heapq.heapify(heap)
        solved: list[_Node] = []
        while heap and len(solved) < limit and not budget.exhausted:
            _, _, node = heapq.heappop(heap)
            budget.spent += 1
            found = overload(node)
            if found is None:
                solved.append(node)
                continue
            for child in self._children(node, found):
                heapq.heappush(heap, (self._priority_s(child, overload(child)), next(self.ties), child))
        return solved

    def _children(self, node: _Node, overload: "_Overload") -> list[_Node]:
        """Return nodes in which the overloaded place is forbidden to as many agents as are too many there."""
        detours = []
        for index, path in enumerate(node.paths):
            if not overload.slots.isdisjoint(path.route):
                old = node.constraints[index]
                constraints = replace(old, forbidden_slots=old.forbidden_slots | overload.slots)
                detour = self.finder.find(self.agents[index], constraints)
                if detour is not None:
                    detours.append((detour.cost_s, index, constraints, detour))
        detours.sort(key=lambda detour: detour[:2])
        last = min(_MAX_CHILDREN, len(detours) - overload.excess + 1)
        return [
            _changed(node, [detour[1:] for detour in detours[first : first + overload.excess]]) for first in range(last)
        ]

    def _with_stages_kept(self, node: _Node) -> _Node:
        """Constrain every agent to the stages that it visits now."""
        kept = tuple(Constraints(stages=self._stages(path)) for path in node.paths)
        return _Node(kept, node.paths)

    def without_collisions(self, nodes: Sequence[_Node]) -> Iterator[_Node]:
        """Resolve conflicts of kind 3, best first; yield up to `_SOLUTIONS * effort` nodes without them."""
        heap = [(self._priority_s(node, len(self._collisions(node))), next(self.ties), node) for node in nodes]
        heapq.heapify(heap)
        solved = 0
        while heap and solved < _SOLUTIONS * self.effort and not self.budget.exhausted:
            _, _, node = heapq.heappop(heap)
            self.budget.spent += 1
            collisions = self._collisions(node)
            if not collisions:
                solved += 1
                yield node
                continue
            for index, window in self._who_waits(node, collisions[0]):
                old = node.constraints[index]
                constraints = replace(old, windows=old.windows | {window})
                path = self.finder.find(self.agents[index], constraints)
                if path is not None:
                    child = _changed(node, [(index, constraints, path)])
                    heapq.heappush(
                        heap, (self._priority_s(child, len(self._collisions(child))), next(self.ties), child)
                    )

    def _with(self, constraints: Sequence[Constraints]) -> _Node | None:
        paths = []
        for agent, own in zip(self.agents, constraints, strict=True):
            path = None if self.budget.exhausted else self.finder.find(agent, own)
            if path is None:
                return None
            paths.append(path)
        return _Node(tuple(constraints), tuple(paths))

    def _priority_s(self, node: _Node, overload: "_Overload | int | None") -> float:
        conflicts = overload.excess if isinstance(overload, _Overload) else overload or 0
        return max(path.cost_s for path in node.paths) * (1 + _PENALTY * conflicts)

    def _stages(self, path: Path) -> frozenset[int]:
        return frozenset(self.costs.slot_model.stage_of[slot] for slot in path.route[1:])

    def _stage_overload(self, node: _Node) -> "_Overload | None":
        """Return the stage with the most visits too many, or None."""
        visits = [0] * self.costs.slot_model.problem.num_stages
        for path in node.paths:
            for stage in self._stages(path):
                visits[stage] += self.size
        shared = self.costs.slot_model.problem.rules.shared_stages
        if not shared:
            return None
        stage = max(shared, key=lambda stage: visits[stage])
        slots = frozenset(self.costs.slot_model.slots_of[stage])
        if visits[stage] > self.wave.stage_cap:
            return _Overload(slots, ceil((visits[stage] - self.wave.stage_cap) / self.size))
        if sum(visits[other] == self.wave.stage_cap for other in shared) > self.wave.full_stages:
            return _Overload(slots, 1)
        return None

    def _counted_stages(self, seed: int) -> list[_Node]:
        """Return a node whose stages the count model chose: it covers evenly if the agents are single microbatches."""
        if self.size > 1:
            return []
        kept = []
        sequences = balanced_sequences(self.costs.slot_model, seed)
        for agent in self.agents:
            sequence = next(stages for stages in sequences if len(stages) == agent.length)
            sequences.remove(sequence)
            kept.append(Constraints(stages=frozenset(sequence[1:])))
        node = self._with(kept)
        return [] if node is None else [node]

    def _slot_overload(self, node: _Node) -> "_Overload | None":
        """Return the first slot that serves too many microbatches, or None."""
        served = [0] * len(self.costs.memory)
        for path in node.paths:
            for slot in path.route[1:]:
                served[slot] += self.size
        for slot, (number, cap) in enumerate(zip(served, self.wave.slot_caps, strict=True)):
            if number > cap:
                return _Overload(frozenset({slot}), ceil((number - cap) / self.size))
        return None

    def _collisions(self, node: _Node) -> list[tuple["_Stay", "_Stay"]]:
        """Return neighbouring stays at a node that overlap, at least one of them a forward, in order of time."""
        by_slot: list[list[_Stay]] = [[] for _ in self.costs.memory]
        for index, path in enumerate(node.paths):
            for hop, slot in enumerate(path.route):
                begin_s, home_s = path.starts[hop], path.starts[2 * len(path.route) - hop]
                forward_s = self.finder.factor * self.costs.forward_s[slot]
                backward_s = self.finder.factor * self.costs.backward_s[slot]
                by_slot[slot].append(_Stay(begin_s, begin_s + forward_s, index, slot, True))
                by_slot[slot].append(_Stay(home_s, home_s + backward_s, index, slot, False))
        found = []
        for stays in by_slot:
            stays.sort()
            for first, second in pairwise(stays):
                overlap = second.begin_s < first.end_s - 1e-9 and first.agent != second.agent
                if overlap and (first.forward or second.forward):
                    found.append((first, second))
        return sorted(found, key=lambda pair: pair[1])

    def _who_waits(self, node: _Node, pair: tuple["_Stay", "_Stay"]) -> list[tuple[int, Window]]:
        """Return the agents that may wait for the other one of a pair, and when they then may not compute."""
        half_s = sorted(path.cost_s for path in node.paths)[len(node.paths) // 2]
        forwards = [(node.paths[stay.agent].cost_s, stay, other) for stay, other in (pair, pair[::-1]) if stay.forward]
        forwards.sort(key=lambda forward: forward[:2])
        return [
            (stay.agent, (stay.slot, other.begin_s, other.end_s))
            for place, (cost_s, stay, other) in enumerate(forwards)
            if place == 0 or cost_s >= half_s
        ]


@dataclass(frozen=True)
class _Overload:
    """All slots of a stage, or one slot, and how many agents are too many there."""

    slots: frozenset[int]
    excess: int


_FindOverload = Callable[[_Node], _Overload | None]


@dataclass(frozen=True, order=True)
class _Stay:
    """An agent at a slot, for its forward or its backward."""

    begin_s: float
    end_s: float
    agent: int
    slot: int
    forward: bool


def _changed(node: _Node, changes: Sequence[tuple[int, Constraints, Path]]) -> _Node:
    constraints, paths = list(node.constraints), list(node.paths)
    for index, new_constraints, new_path in changes:
        constraints[index], paths[index] = new_constraints, new_path
    return _Node(tuple(constraints), tuple(paths))
