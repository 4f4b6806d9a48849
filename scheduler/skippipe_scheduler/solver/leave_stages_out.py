"""A plan from one that visits more stages: its placement and its order, with stages left out of its routes.

Nothing has to wait for what is left out, so the plan is no slower, unless the link past a left-out stage is slower than
the two links by way of it. Then a node of that stage may relay the messages.
"""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from ortools.graph.python.min_cost_flow import SimpleMinCostFlow

from skippipe_scheduler.plan.plan import Operation, Plan
from skippipe_scheduler.plan.simulate import simulate
from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.slots.routes import balanced_sequences
from skippipe_scheduler.slots.slot_model import SlotCosts, SlotModel, SlotPlacement, SlotRoute
from skippipe_scheduler.slots.solution import Solution

StageSequence = tuple[int, ...]
_MOST_PAIRS = 60_000
"""Pairs of a route and a sequence of stages that are priced. Chosen: about a second."""
_COST_UNITS = 1_000_000
"""Whole units of the longest round trip, for the flow. Chosen."""


def schedules_without_stages(fuller: Plan, problem: Problem, seed: int) -> Iterator[Solution]:
    """Yield schedules of `problem` with placement and order of `fuller`, whose routes visit every stage in order.

    They differ in which microbatch leaves out which stages; `iteration_s` is left at 0, to be timed. None where the
    problem has another placement, other sizes of stages or another number of microbatches.
    """
    slot_model = SlotModel(problem)
    known = _Schedule.of(fuller, slot_model)
    if known is None:
        return
    sequences = _ascending_sequences(slot_model, seed)
    costs = SlotCosts(slot_model, known.placement)
    for chosen in (_cheapest(costs, known.routes, sequences), _spread(known.routes, sequences, seed)):
        if chosen is not None:
            routes = zip(known.routes, chosen, strict=True)
            yield known.along(tuple(tuple(route[stage] for stage in stages) for route, stages in routes))


def schedule_with_relays(fuller: Plan, problem: Problem, seed: int) -> Solution | None:
    """Return such a schedule in which the nodes of stages that are left out relay; its routes are those of `fuller`.

    Its messages take the same links as before. None where the others are none.
    """
    slot_model = SlotModel(problem)
    known = _Schedule.of(fuller, slot_model)
    if known is None:
        return None
    chosen = _spread(known.routes, _ascending_sequences(slot_model, seed), seed)
    relays = [tuple(stage not in stages for stage in range(problem.num_stages)) for stages in chosen]
    return replace(known.along(known.routes), relays=tuple(relays))


def _ascending_sequences(slot_model: SlotModel, seed: int) -> list[StageSequence]:
    """Return a sequence of stages for each microbatch, ascending.

    So it stays legal, and the order of a plan whose routes visit every stage in order cannot deadlock.
    """
    return [tuple(sorted(sequence)) for sequence in balanced_sequences(slot_model, seed)]


@dataclass(frozen=True)
class _Schedule:
    """A plan by slot: its placement, its routes, and when each task (microbatch, operation, slot) begins."""

    placement: SlotPlacement
    routes: tuple[SlotRoute, ...]
    begun_s: Mapping[tuple[int, Operation, int], float]

    @classmethod
    def of(cls, plan: Plan, slot_model: SlotModel) -> Self | None:
        """Return the plan by the slots of a problem; None where they or the microbatches are not the same."""
        problem = slot_model.problem
        ranks = {node: rank for rank, node in enumerate(problem.nodes)}
        held = [node for stage in plan.stages for node in stage.nodes]
        placement = tuple(ranks[node] for node in held)
        same_sizes = tuple(len(stage.nodes) for stage in plan.stages) == problem.sizes
        fits = slot_model.given_placement() in (None, placement) and len(plan.microbatches) == problem.num_microbatches
        pinned = all(plan.stage_of[node] == stage for node, stage in (problem.pinned or {}).items())
        if not (same_sizes and fits and pinned):
            return None
        slot_of = {node: slot for slot, node in enumerate(held)}
        begun_s = {(task.microbatch, task.operation, slot_of[task.node]): task.start_s for task in simulate(plan).tasks}
        routes = tuple(tuple(slot_of[node] for node in microbatch.route) for microbatch in plan.microbatches)
        return cls(placement, routes, begun_s)

    def along(self, routes: tuple[SlotRoute, ...]) -> Solution:
        """Return the schedule along other routes, whose slots are among its own; to be timed."""
        starts = []
        for microbatch, route in enumerate(routes):
            ahead = [self.begun_s[microbatch, "F", slot] for slot in route]
            back = [self.begun_s[microbatch, "B", slot] for slot in reversed(route)]
            starts.append((*ahead, self.begun_s[microbatch, "L", route[0]], *back))
        return Solution(self.placement, routes, tuple(starts), iteration_s=0.0, score=0.0)


def _spread(whole: Sequence[SlotRoute], sequences: Sequence[StageSequence], seed: int) -> list[StageSequence]:
    """Return a sequence for each route, spread at random."""
    chosen = list(sequences)
    random.Random(seed).shuffle(chosen)
    return chosen


def _cheapest(
    costs: SlotCosts, whole: Sequence[SlotRoute], sequences: Sequence[StageSequence]
) -> list[StageSequence] | None:
    """Return a sequence for each route so that all round trips together are shortest; None where that takes too long.

    A transport problem from routes to sequences, each with as many microbatches as have it.
    """
    routes, kinds = Counter(whole), Counter(sequences)
    if len(routes) * len(kinds) > _MOST_PAIRS:
        return None
    trips_s = {
        (route, kind): costs.chain(tuple(route[stage] for stage in kind)).round_trip_s
        for route in routes
        for kind in kinds
    }
    unit_s = max(trips_s.values()) / _COST_UNITS
    flow, arcs = SimpleMinCostFlow(), {}
    node_of = {
        name: node for node, name in enumerate([*((0, route) for route in routes), *((1, kind) for kind in kinds)])
    }
    for (route, kind), trip_s in trips_s.items():
        arc = flow.add_arc_with_capacity_and_unit_cost(
            node_of[0, route], node_of[1, kind], min(routes[route], kinds[kind]), round(trip_s / unit_s)
        )
        arcs[arc] = route, kind
    for route, count in routes.items():
        flow.set_node_supply(node_of[0, route], count)
    for kind, count in kinds.items():
        flow.set_node_supply(node_of[1, kind], -count)
    if flow.solve() != flow.OPTIMAL:
        return None
    given: dict[SlotRoute, list[StageSequence]] = {route: [] for route in routes}
    for arc, (route, kind) in arcs.items():
        given[route] += [kind] * flow.flow(arc)
    return [given[route].pop() for route in whole]
