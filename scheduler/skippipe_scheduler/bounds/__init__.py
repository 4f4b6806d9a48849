"""Lower bounds of the iteration time of a problem as posed: over all routes, all orders and, where it is free, all
placements. Links that are shared only delay, so the bounds hold with them too.

A new bound is a module here, with a function for its seconds and one for its sentence, and a row of `BOUNDS`.
"""

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

from skippipe_scheduler.bounds.carrying import carrying_s, explain_carrying
from skippipe_scheduler.bounds.network import Network
from skippipe_scheduler.bounds.origins import by_need, explain_origin, over_origins_s, trip_s, waves_s
from skippipe_scheduler.bounds.reductions import explain_reductions, reductions_s
from skippipe_scheduler.bounds.route_program.relaxation import explain_route_program
from skippipe_scheduler.bounds.walks import Idle, Trips, idle_ends, shortest_trips
from skippipe_scheduler.bounds.work import explain_work, node_work_s
from skippipe_scheduler.budget import Budget
from skippipe_scheduler.problem.problem import Problem

if TYPE_CHECKING:
    from skippipe_scheduler.bounds.origin_schedule import Schedules

__all__ = ["BOUNDS", "LowerBound", "explain_bound", "lower_bounds"]

_SLACK = 1 - 1e-9
"""Bounds are lowered by this factor, so that rounding never makes one exceed the true time. Chosen: sums of thousands
of floats are off by much less."""
_SAME = 1 - 1e-6
"""Bounds within this factor of the largest count as equal when one is to be explained. Chosen."""
_SCHEDULES_PART = 0.5
"""Share of the time for the origins' schedules; the route program, which needs them, gets the rest. Chosen."""


@dataclass
class Known:
    """What the bounds of one problem build on: `known_s` is the largest so far, `budget` what is left for searches."""

    network: Network
    trips: Trips
    idle: Idle
    budget: Budget
    known_s: float = 0.0

    @cached_property
    def schedules(self) -> "Schedules":
        """The least times of single origins, each solved once and for all bounds."""
        from skippipe_scheduler.bounds.origin_schedule import Schedules

        return Schedules(self.network, self.trips, self.budget.share(_SCHEDULES_PART))


@dataclass(frozen=True)
class LowerBound:
    """One kind of bound: its name in reports, its seconds, and a sentence on what binds and what would help.

    One that `searches` takes time, is valid whenever its budget ends, and is left out where there is none. Each is
    there only for problems to which it `applies`.
    """

    name: str
    seconds: Callable[[Known], float]
    explain: Callable[[Network, float], str]
    searches: bool = False
    applies: Callable[[Problem], bool] = lambda problem: True


def _node_work_s(known: Known) -> float:
    return node_work_s(known.network, known.idle)


def _round_trip_s(known: Known) -> float:
    return over_origins_s(known.network, partial(trip_s, known.network, known.trips))


def _origin_waves_s(known: Known) -> float:
    return over_origins_s(known.network, partial(waves_s, known.network, known.trips))


def _carrying_s(known: Known) -> float:
    return carrying_s(known.network)


def _shares_capacities(problem: Problem) -> bool:
    return problem.costs.contention == "shared"


def _reductions_s(known: Known) -> float:
    return reductions_s(known.network, known.idle)


def _places_reductions(problem: Problem) -> bool:
    return problem.stages is None and problem.reduction_links() is not None


def _origin_schedule_s(known: Known) -> float:
    for origin, count in by_need(known.network, known.trips):
        known.schedules.least_s(origin, count)
    return over_origins_s(known.network, known.schedules.least_s)


def _route_program_s(known: Known) -> float:
    from skippipe_scheduler.bounds.route_program.branching import route_program_s
    from skippipe_scheduler.bounds.route_program.listed_routes import listed_routes

    known.schedules.budget = known.budget
    listed = listed_routes(known.network)
    least_beside_s = partial(known.schedules.least_beside_s, listed=listed)
    return route_program_s(known.network, known.idle, known.known_s, least_beside_s, listed, known.budget)


BOUNDS = (
    LowerBound("node work", _node_work_s, explain_work),
    LowerBound("round trip", _round_trip_s, explain_origin),
    LowerBound("origin waves", _origin_waves_s, explain_origin),
    LowerBound("carrying", _carrying_s, explain_carrying, applies=_shares_capacities),
    LowerBound("reductions", _reductions_s, explain_reductions, applies=_places_reductions),
    LowerBound("origin schedule", _origin_schedule_s, explain_origin, searches=True),
    LowerBound("route program", _route_program_s, explain_route_program, searches=True),
)
"""Every kind of bound, the simplest first; those that search come last and build on those before them."""


def lower_bounds(problem: Problem, budget_s: float = 2.0, stop: threading.Event | None = None) -> dict[str, float]:
    """Return lower bounds of the iteration time: no plan of the problem is shorter.

    They hold over all routes, all orders and, where it is free, all placements. The quick ones are always there.

    Args:
        problem: The problem.
        budget_s: Wall-clock seconds for all bounds that search together; with 0 only the quick ones are returned.
        stop: Ends the search early, from any thread; a bound that ends early is valid, only weaker.

    Returns:
        Seconds by the names of `BOUNDS`; the largest is the best known. Infinite where no route is legal.

    Examples:
        >>> bounds = lower_bounds(problem, budget_s=0)
        >>> sorted(bounds)
        ['node work', 'origin waves', 'reductions', 'round trip']
        >>> max(bounds.values()) <= plan.predicted.iteration_s
        True
    """
    network = Network(problem)
    trips, idle = shortest_trips(network), idle_ends(network)
    known = Known(network, trips, idle, Budget(budget_s, stop=stop))
    found: dict[str, float] = {}
    for bound in BOUNDS:
        if not bound.applies(problem) or (bound.searches and (budget_s <= 0 or not math.isfinite(known.known_s))):
            continue
        found[bound.name] = bound.seconds(known)
        known.known_s = max(known.known_s, found[bound.name])
    return {name: float(bound_s) * _SLACK for name, bound_s in found.items()}


def explain_bound(problem: Problem, bounds: Mapping[str, float]) -> str:
    """Return one or two sentences on the largest of `bounds` (of `lower_bounds`); of equals, the simplest counts.

    Raises `ValueError` where it is not one of `BOUNDS`.
    """
    highest_s = max(bounds.values())
    name = next(name for name, bound_s in bounds.items() if bound_s >= highest_s * _SAME)
    for bound in BOUNDS:
        if bound.name == name:
            return bound.explain(Network(problem), highest_s)
    raise ValueError(f"lower bound {name!r} is not one of {', '.join(bound.name for bound in BOUNDS)}")
