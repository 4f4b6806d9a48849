"""Routes by a count model: how many microbatches of each origin take which route (an integer program).

The program minimises the largest of two bounds over the slots, work and memory (Little's law: the time a
slot's microbatches are held, divided by how many it can hold), and then the mean round trip. Small problems
list every route; large ones only cheap and some random ones per origin and stage sequence, and are then
heuristic.
"""

from dataclasses import dataclass
from math import ceil, floor

from ortools.sat.python import cp_model

from skippipe_scheduler.budget import Budget
from skippipe_scheduler.slots.candidate_routes import list_routes
from skippipe_scheduler.slots.routes import balanced_routes
from skippipe_scheduler.slots.slot_model import SlotCosts, SlotModel, SlotRoute

UNITS = 100_000
"""Whole units of time in the longest round trip. Chosen: rounding down costs the bound next to nothing."""
AT_MOST_S = 3.0
"""Seconds, or units of deterministic time, for the program. Chosen."""


@dataclass(frozen=True)
class RouteChoice:
    """One route per microbatch; `bound_s` is a lower bound of the iteration (0 unless all routes were
    considered).
    """

    routes: tuple[SlotRoute, ...]
    bound_s: float


def choose_routes(
    costs: SlotCosts,
    budget: Budget,
    seed: int,
    num_workers: int = 1,
    *,
    part: float = 0.2,
    at_most_s: float = AT_MOST_S,
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
        self.unit_s = max(chain.round_trip_s for chain in self.chains) / UNITS
        self.counts = [model.new_int_var(0, total, "") for _ in routes]
        self.peak = model.new_int_var(0, UNITS * (1 + total) * 2, "peak")
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
