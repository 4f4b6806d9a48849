"""Lower bounds of the iteration time of a problem as posed: over all routes, all orders and, where it is free, all
placements. Links that are shared only delay, so the bounds hold with them too.
"""

import math
import threading
from functools import partial

from skippipe_scheduler.bounds.explain_bound import explain_bound
from skippipe_scheduler.bounds.network import Network
from skippipe_scheduler.bounds.origins import over_origins_s, trip_s, waves_s
from skippipe_scheduler.bounds.walks import Idle, Trips, idle_ends, shortest_trips
from skippipe_scheduler.bounds.work import node_work_s
from skippipe_scheduler.budget import Budget
from skippipe_scheduler.problem.problem import Problem

__all__ = ["explain_bound", "lower_bounds"]
_SLACK = 1 - 1e-9
"""Bounds are lowered by this much, so that rounding never makes one exceed the true time."""


def lower_bounds(problem: Problem, budget_s: float = 2.0, stop: threading.Event | None = None) -> dict[str, float]:
    """Return named lower bounds in seconds; the largest is the best known. Infinite where no route is legal.

    The cheap ones always; the others within `budget_s` of wall-clock time or until `stop` is set (a bound that ends
    early is valid, only weaker).
    """
    network = Network(problem)
    trips, idle = shortest_trips(network), idle_ends(network)
    bounds = {
        "node work": node_work_s(network, idle),
        "round trip": over_origins_s(network, lambda origin, count: trip_s(network, trips, origin, count)),
        "origin waves": over_origins_s(network, lambda origin, count: waves_s(network, trips, origin, count)),
    }
    if budget_s > 0 and math.isfinite(max(bounds.values())):
        bounds |= _searched(network, trips, idle, max(bounds.values()), Budget(budget_s, stop=stop))
    return {name: float(bound_s) * _SLACK for name, bound_s in bounds.items()}


def _searched(network: Network, trips: Trips, idle: Idle, known_s: float, budget: Budget) -> dict[str, float]:
    """Return the bounds that take time: the origins' schedules get half of the budget, the route program the rest."""
    from skippipe_scheduler.bounds.listed_routes import listed_routes
    from skippipe_scheduler.bounds.origin_schedule import Schedules
    from skippipe_scheduler.bounds.route_program import route_program_s

    schedules = Schedules(network, trips, budget.share(0.5))
    for origin, count in _by_need(network, trips):
        schedules.least_s(origin, count)
    bounds = {"origin schedule": over_origins_s(network, schedules.least_s)}
    schedules.budget = budget
    known_s = max(known_s, bounds["origin schedule"])
    listed = listed_routes(network)
    least_beside_s = partial(schedules.least_beside_s, listed=listed)
    bounds["route program"] = route_program_s(network, idle, known_s, least_beside_s, listed, budget)
    return bounds


def _by_need(network: Network, trips: Trips) -> list[tuple[int, int]]:
    """Return origins and counts whose schedules decide the bound, most needed first: the slowest origins or, where the
    best nodes become origins, the fastest.
    """
    if network.problem.free_origins:
        return []
    counts = network.counts if network.fixed else (network.least_count,) * len(network.origins)
    sign = -1 if network.fixed else 1
    return sorted(enumerate(counts), key=lambda pair: sign * waves_s(network, trips, *pair))
