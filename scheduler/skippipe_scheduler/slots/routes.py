"""Routes by a count model: how many microbatches of each origin take which route (an integer program).

The program minimises the largest of two bounds over the slots, work and memory (Little's law: the time a
slot's microbatches are held, divided by how many it can hold), and then the mean round trip. Small problems
list every route; large ones only cheap and some random ones per origin and stage sequence, and are then
heuristic.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, prod

import numpy as np
import numpy.typing as npt
from ortools.sat.python import cp_model

from skippipe_scheduler.budget import Budget
from skippipe_scheduler.problem.coverage import even_sequences
from skippipe_scheduler.problem.infeasibility import check_feasible
from skippipe_scheduler.slots.slot_model import SlotCosts, SlotModel, SlotRoute

MAX_ROUTES = 2500
_MAX_SEQUENCES = 60
_UNITS = 100_000


@dataclass(frozen=True)
class Candidates:
    """Routes to choose from; `complete` when these are all legal ones."""

    routes: tuple[SlotRoute, ...]
    complete: bool


@dataclass(frozen=True)
class RouteChoice:
    """One route per microbatch; `bound_s` is a lower bound of the iteration (0 unless all routes were
    considered).
    """

    routes: tuple[SlotRoute, ...]
    bound_s: float


def count_routes(slot_model: SlotModel) -> int:
    """Return the number of routes along the sequences of `slot_model`."""
    return sum(prod(len(slot_model.slots_of[stage]) for stage in sequence) for sequence in slot_model.sequences)


def list_routes(costs: SlotCosts, seed: int, limit: int = MAX_ROUTES) -> Candidates:
    """Return every legal route if there are at most `limit`, else cheap and random ones."""
    slot_model = costs.slot_model
    if slot_model.lists_all_sequences and count_routes(slot_model) <= limit:
        every = itertools.chain.from_iterable(
            itertools.product(*(slot_model.slots_of[s] for s in sequence)) for sequence in slot_model.sequences
        )
        return Candidates(tuple(every), complete=True)
    rng = random.Random(seed)
    sequences = list(slot_model.sequences)
    if len(sequences) > _MAX_SEQUENCES:
        sequences = spread_sequences(slot_model, rng, _MAX_SEQUENCES)
    origins = slot_model.slots_of[0]
    per_pair = max(2, limit // (len(origins) * len(sequences)))
    found: dict[SlotRoute, None] = {}
    for origin in origins:
        for sequence in sequences:
            for route in _cheapest(costs, origin, sequence, per_pair - per_pair // 3):
                found[route] = None
            for _ in range(per_pair // 3):
                found[origin, *(rng.choice(slot_model.slots_of[stage]) for stage in sequence[1:])] = None
    return Candidates(tuple(found), complete=False)


def spread_sequences(slot_model: SlotModel, rng: random.Random, count: int) -> list[tuple[int, ...]]:
    """Return up to `count` legal sequences that visit the stages about equally often."""
    visits = [0] * slot_model.problem.num_stages
    rest = list(slot_model.sequences)
    rng.shuffle(rest)
    chosen: list[tuple[int, ...]] = []
    while rest and len(chosen) < count:
        best = min(rest[:400], key=lambda sequence: sum(visits[stage] for stage in sequence))
        rest.remove(best)
        chosen.append(best)
        for stage in best:
            visits[stage] += 1
    return chosen


def _cheapest(costs: SlotCosts, origin: int, sequence: tuple[int, ...], count: int) -> list[SlotRoute]:
    """Return about the `count` cheapest routes along `sequence` (beam search that keeps every last slot)."""
    partial: list[tuple[float, SlotRoute]] = [(0.0, (origin,))]
    slots_of = costs.slot_model.slots_of
    for stage in sequence[1:]:
        longer: list[tuple[float, SlotRoute]] = []
        for slot in slots_of[stage]:
            work_s = costs.forward_s[slot] + costs.backward_s[slot]
            reached = sorted(
                (length_s + costs.both_ways_s(route[-1], slot) + work_s, (*route, slot)) for length_s, route in partial
            )
            longer += reached[: max(1, count // len(slots_of[stage]) + 1)]
        partial = longer
    closed = sorted((length_s + costs.both_ways_s(route[-1], origin), route) for length_s, route in partial)
    return [route for _, route in closed[:count]]


def choose_routes(
    costs: SlotCosts,
    budget: Budget,
    seed: int,
    num_workers: int = 1,
    *,
    part: float = 0.2,
    at_most_s: float = 3.0,
) -> RouteChoice:
    """Solve the count model within `part` of `budget`; raise `InfeasibleError` where no routes obey the rules."""
    candidates = list_routes(costs, seed)
    solver = cp_model.CpSolver()
    model = _CountModel(costs, candidates.routes)
    budget.configure(solver, seed, num_workers, part / 2, at_most_s / 2)
    model.model.minimize(model.peak)
    status = budget.run(solver, model.model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return RouteChoice(balanced_routes(costs.slot_model, seed), 0.0)
    bound_s = solver.best_objective_bound * model.unit_s if candidates.complete else 0.0
    counts = [solver.value(count) for count in model.counts]
    model.refine(counts, round(solver.objective_value))
    budget.configure(solver, seed, num_workers, part / 2, at_most_s / 2)
    if budget.run(solver, model.model) in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        counts = [solver.value(count) for count in model.counts]
    rows = sorted(zip(candidates.routes, counts, strict=True))
    return RouteChoice(tuple(route for route, count in rows for _ in range(count)), bound_s)


class _CountModel:
    """The integer program; times are whole units, rounded down so that its bound stays valid."""

    def __init__(self, costs: SlotCosts, routes: tuple[SlotRoute, ...]) -> None:
        slot_model, model = costs.slot_model, cp_model.CpModel()
        self.model, self.routes = model, routes
        self.chains = [costs.chain(route) for route in routes]
        total = len(slot_model.origins)
        self.unit_s = max(chain.round_trip_s for chain in self.chains) / _UNITS
        self.counts = [model.new_int_var(0, total, "") for _ in routes]
        self.peak = model.new_int_var(0, _UNITS * (1 + total) * 2, "peak")
        if slot_model.problem.free_origins:
            model.add(sum(self.counts) == total)
        else:
            for origin, count in enumerate(slot_model.problem.microbatches_of_origins()):
                model.add(sum(v for v, route in zip(self.counts, routes, strict=True) if route[0] == origin) == count)
        for length, count in slot_model.problem.rules.length_counts(total).items():
            model.add(sum(v for v, route in zip(self.counts, routes, strict=True) if len(route) == length) == count)
        self._balance(slot_model)
        for slot in range(len(slot_model.stage_of)):
            self._limit(costs, slot)

    def _balance(self, slot_model: SlotModel) -> None:
        for stage, bounds in slot_model.limits.items():
            here = set(slot_model.slots_of[stage])
            visits = sum(v for v, route in zip(self.counts, self.routes, strict=True) if here.intersection(route))
            self.model.add_linear_constraint(visits, *bounds)

    def _limit(self, costs: SlotCosts, slot: int) -> None:
        work_s = costs.forward_s[slot] + costs.backward_s[slot] + 2 * costs.overhead_s
        if slot in costs.slot_model.slots_of[0]:
            work_s += costs.loss_s[slot] + costs.overhead_s
        slack = floor(costs.overhead_s / self.unit_s) + 1
        here = [
            (v, chain.residence_s[route.index(slot)])
            for v, route, chain in zip(self.counts, self.routes, self.chains, strict=True)
            if slot in route
        ]
        if here:
            memory = costs.memory[slot]
            held = sum(v * floor(residence_s / self.unit_s) for v, residence_s in here)
            self.model.add(held <= memory * self.peak)
            self.model.add(sum(v for v, _ in here) * floor(work_s / self.unit_s) <= self.peak + slack)

    def refine(self, counts: list[int], peak: int) -> None:
        """Turn to the mean round trip, with the peak at most what was found."""
        self.model.add(self.peak <= peak)
        self.model.clear_hints()
        for variable, value in zip(self.counts, counts, strict=True):
            self.model.add_hint(variable, value)
        trips = (ceil(chain.round_trip_s / self.unit_s) for chain in self.chains)
        self.model.minimize(sum(v * trip for v, trip in zip(self.counts, trips, strict=True)))


def balanced_routes(slot_model: SlotModel, seed: int) -> tuple[SlotRoute, ...]:
    """Return routes that cover the stages and load the slots evenly, whatever they cost.

    Each origin's microbatches go together as far as the even load allows, which makes groups of slots that share them.
    """
    rng = random.Random(seed)
    sequences = balanced_sequences(slot_model, seed)
    visits = [sum(stage in sequence for sequence in sequences) for stage in range(slot_model.problem.num_stages)]
    room = {
        slot: float(ceil(visits[stage] / len(slot_model.slots_of[stage])))
        for slot, stage in enumerate(slot_model.stage_of)
    }
    routes: list[SlotRoute] = []
    last: SlotRoute | None = None
    for origin, sequence in zip(slot_model.origins, sequences, strict=True):
        route = [origin]
        for stage in sequence[1:]:
            slots = list(slot_model.slots_of[stage])
            rng.shuffle(slots)
            kept = [slot for slot in slots if last and last[0] == origin and slot in last and room[slot] > 0]
            slot = kept[0] if kept else max(slots, key=lambda slot: room[slot])
            room[slot] -= 1
            route.append(slot)
        last = tuple(route)
        routes.append(last)
    return tuple(routes)


def priced_routes(costs: SlotCosts, seed: int) -> tuple[SlotRoute, ...]:
    """Return routes that cover the stages evenly, each the cheapest along its stages through slots with room left.

    The origins take turns. A slot's room is its share of the visits of its stage by speed, a tenth more at most.
    """
    slot_model = costs.slot_model
    sequences = balanced_sequences(slot_model, seed)
    rng = random.Random(seed)
    rng.shuffle(sequences)
    room = _rooms(costs, sequences)
    turn = sorted(
        range(len(slot_model.origins)),
        key=lambda microbatch: (_turn(slot_model.origins, microbatch), slot_model.origins[microbatch]),
    )
    hop_s = np.array(costs.transfer_s)
    hop_s = hop_s + hop_s.T
    work_s = np.array(costs.forward_s) + np.array(costs.backward_s)
    routes: list[SlotRoute] = [()] * len(slot_model.origins)
    for microbatch, sequence in zip(turn, sequences, strict=True):
        routes[microbatch] = _cheapest_with_room(
            slot_model, hop_s, work_s, slot_model.origins[microbatch], sequence, room
        )
        room[list(routes[microbatch])] -= 1
    return tuple(routes)


def _turn(origins: Sequence[int], microbatch: int) -> int:
    return microbatch - origins.index(origins[microbatch])


def _rooms(costs: SlotCosts, sequences: Sequence[tuple[int, ...]]) -> npt.NDArray[np.float64]:
    slot_model = costs.slot_model
    room = np.zeros(len(slot_model.stage_of))
    for stage, slots in enumerate(slot_model.slots_of):
        visits = sum(stage in sequence for sequence in sequences)
        speed = np.array([1 / (costs.forward_s[slot] + costs.backward_s[slot]) for slot in slots])
        room[list(slots)] = np.ceil(1.1 * visits * speed / speed.sum())
    return room


def _cheapest_with_room(
    slot_model: SlotModel,
    hop_s: npt.NDArray[np.float64],
    work_s: npt.NDArray[np.float64],
    origin: int,
    sequence: tuple[int, ...],
    room: npt.NDArray[np.float64],
) -> SlotRoute:
    """Return the cheapest closed walk along `sequence`; a slot without room costs much, but is never forbidden."""
    crowded_s = np.where(room > 0, 0.0, 100 * work_s.max() * (1 - room))
    length_s, slots, came_from = np.zeros(1), np.array([origin]), []
    for stage in sequence[1:]:
        here = np.array(slot_model.slots_of[stage])
        reached_s = length_s[:, None] + hop_s[np.ix_(slots, here)]
        came_from.append((slots, reached_s.argmin(axis=0)))
        length_s = reached_s.min(axis=0) + work_s[here] + crowded_s[here]
        slots = here
    last = int((length_s + hop_s[slots, origin]).argmin())
    route = [int(slots[last])]
    for before, choice in reversed(came_from):
        last = int(choice[last])
        route.append(int(before[last]))
    return tuple(reversed(route))


def balanced_sequences(slot_model: SlotModel, seed: int) -> list[tuple[int, ...]]:
    """Return one stage sequence per microbatch with even coverage; raise `InfeasibleError` naming the rules that
    conflict where there are none.
    """
    check_feasible(slot_model.problem)
    found = _few_sequences(slot_model, seed) or even_sequences(slot_model.problem.rules, len(slot_model.origins), seed)
    if slot_model.problem.rules.route_lengths:
        random.Random(seed).shuffle(found)  # else the short ones would all go to the first origins
    return found


def _few_sequences(slot_model: SlotModel, seed: int) -> list[tuple[int, ...]] | None:
    """Return sequences with even coverage, few of them different, or None where those of the slot model have none."""
    model, solver, rng = cp_model.CpModel(), cp_model.CpSolver(), random.Random(seed)
    total = len(slot_model.origins)
    counts = [model.new_int_var(0, total, "") for _ in slot_model.sequences]
    for length, wanted in slot_model.problem.rules.length_counts(total).items():
        model.add(
            sum(v for v, stages in zip(counts, slot_model.sequences, strict=True) if len(stages) == length) == wanted
        )
    for stage, bounds in slot_model.limits.items():
        visits = sum(v for v, sequence in zip(counts, slot_model.sequences, strict=True) if stage in sequence)
        model.add_linear_constraint(visits, *bounds)
    used = [model.new_bool_var("") for _ in counts]
    for count, flag in zip(counts, used, strict=True):
        model.add(count <= total * flag)
    model.minimize(sum(flag * rng.randint(8, 12) for flag in used))
    solver.parameters.num_workers = 1
    solver.parameters.catch_sigint_signal = False
    solver.parameters.random_seed = seed % 2**31
    solver.parameters.max_deterministic_time = 0.3
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    return [
        sequence
        for sequence, count in zip(slot_model.sequences, counts, strict=True)
        for _ in range(solver.value(count))
    ]
