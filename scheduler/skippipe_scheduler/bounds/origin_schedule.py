"""The bound from one origin's own schedule: forwards, losses and backwards on one node, in CP-SAT."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from ortools.sat.python import cp_model

from skippipe_scheduler.bounds.network import Mask, Network, Vector
from skippipe_scheduler.bounds.origins import waves_s
from skippipe_scheduler.bounds.route_program.listed_routes import ListedRoutes
from skippipe_scheduler.bounds.walks import Trips, shortest_trips
from skippipe_scheduler.budget import Budget

_FEW_DIGITS, _DIGITS = 4, 7
"""Digits of a time in whole units, first and then: few are quick; with more, times given in a few decimals are exact.
Chosen."""
_ROUNDING = 1e-6
"""Of a unit: less than this below a whole number is taken for it (in all less than the slack of the bounds)."""
_EFFORT = 2.0
"""Units of CP-SAT's deterministic time, about seconds, for one origin. Chosen."""


@dataclass(frozen=True)
class Origin:
    """One origin's microbatches and times in seconds; `out_s`, `home_s` and `trip_s` as in `walks.Trips`."""

    count: int
    memory: int
    forward_s: float
    loss_s: float
    backward_s: float
    overhead_s: float
    out_s: float
    home_s: float
    trip_s: float


class Schedules:
    """Least times of origins by their number of microbatches, each schedule solved once; those that are not begun
    within the budget stay waves.
    """

    def __init__(self, network: Network, trips: Trips, budget: Budget) -> None:
        self.network, self.trips, self.budget = network, trips, budget
        self._solved: dict[Origin, float] = {}
        self._least_s: dict[tuple[int, int], float] = {}

    def least_s(self, origin: int, count: int) -> float:
        """Return the least time of an iteration in which the origin has `count` microbatches, never less than found for
        one microbatch fewer.
        """
        if (origin, count) not in self._least_s:
            fewer_s = self._least_s.get((origin, count - 1), 0.0)
            self._least_s[origin, count] = max(fewer_s, self._solve(self.trips, origin, count))
        return self._least_s[origin, count]

    def least_beside_s(self, chosen: Mask, listed: ListedRoutes | None) -> Vector:
        """Return the least time of an iteration with each candidate as an origin beside those `chosen`: an origin is
        on no other's route.
        """
        trips, count = shortest_trips(self.network, chosen), self.network.least_count
        if listed:
            trips = replace(trips, trip_s=listed.trip_s(chosen))
        return np.array([self._solve(trips, origin, count) for origin in range(len(self.network.origins))])

    def _solve(self, trips: Trips, origin: int, count: int) -> float:
        known_s = waves_s(self.network, trips, origin, count)
        if count < 2 or self.budget.left_s <= 0 or not math.isfinite(known_s):
            return known_s
        reduce_s = self.network.reduce_s[0]
        problem = _origin(self.network, trips, origin, count)
        if problem not in self._solved:
            self._solved[problem] = origin_schedule_s(problem, known_s - reduce_s, self.budget)
        return self._solved[problem] + reduce_s


def _origin(network: Network, trips: Trips, index: int, count: int) -> Origin:
    node = int(network.origins[index])
    return Origin(
        count,
        int(network.memory[node]),
        float(network.forward_s[0][node]),
        float(network.loss_s[node]),
        float(network.backward_s[0][node]),
        network.overhead_s,
        float(trips.out_s[index]),
        float(trips.home_s[index]),
        float(trips.trip_s[index]),
    )


def origin_schedule_s(origin: Origin, known_s: float, budget: Budget) -> float:
    """Return the least time for the origin's microbatches, at least `known_s` (a bound proven otherwise).

    Whatever its routes, each loss comes at least `out_s` after its forward, each backward `home_s` after its loss and
    `trip_s` after the forward's start, and the node does one task at a time and holds at most `memory`. All
    microbatches are alike in this, so exchanging them makes the first forward, loss and backward those of the same
    microbatch, and so on. Times are rounded down to whole units: a relaxation. The search ends
    with the budget or after a fixed effort; its bound is proven at any time.
    """
    bound_s = known_s
    for digits in (_FEW_DIGITS, _DIGITS):
        unit_s = 10.0 ** (math.floor(math.log10(known_s)) - digits)
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = 0
        solver.parameters.catch_sigint_signal = False  # else Ctrl-C would end the planner without a plan
        solver.parameters.max_deterministic_time = _EFFORT
        solver.parameters.max_time_in_seconds = max(0.01, budget.left_s)
        status = budget.run(solver, _model(origin, unit_s))
        if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            bound_s = max(bound_s, float(solver.best_objective_bound) * unit_s)
        if status != cp_model.OPTIMAL:
            break
    return bound_s


def _model(origin: Origin, unit_s: float) -> cp_model.CpModel:
    model = cp_model.CpModel()

    def units(seconds: float) -> int:
        return math.floor(seconds / unit_s + _ROUNDING)

    horizon = units(origin.count * (origin.trip_s + 3 * origin.overhead_s)) + 3 * origin.count

    def tasks() -> list[cp_model.IntVar]:
        return [model.new_int_var(0, horizon, "") for _ in range(origin.count)]

    forwards, losses, backwards = tasks(), tasks(), tasks()
    durations_s = {"forward": origin.forward_s, "loss": origin.loss_s, "backward": origin.backward_s}
    busy = []
    for starts, duration_s in zip((forwards, losses, backwards), durations_s.values(), strict=True):
        size = units(duration_s + origin.overhead_s)
        busy += [model.new_fixed_size_interval_var(start, size, "") for start in starts]
        for earlier, later in pairwise(starts):
            model.add(later >= earlier + size)
    model.add_no_overlap(busy)
    for forward, loss, backward in zip(forwards, losses, backwards, strict=True):
        model.add(loss >= forward + units(origin.forward_s + origin.out_s))
        model.add(backward >= loss + units(origin.loss_s + origin.home_s))
        model.add(backward >= forward + units(origin.trip_s - origin.backward_s))
    for backward, forward in zip(backwards, forwards[origin.memory :], strict=False):
        model.add(forward >= backward + units(origin.backward_s + origin.overhead_s))
    model.minimize(backwards[-1] + units(origin.backward_s))
    return model
