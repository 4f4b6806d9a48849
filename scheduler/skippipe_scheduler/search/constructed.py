"""Schedules that need no search: placements by groups of near nodes, the cheapest routes, each microbatch in turn.

What a search makes of them may be worse for a while; so they are timed exactly as they are, and stay in the running.
"""

from collections.abc import Callable
from dataclasses import dataclass

from skippipe_scheduler.budget import Budget
from skippipe_scheduler.options import Robustness
from skippipe_scheduler.search.local_search import LocalSearch
from skippipe_scheduler.slots.placement import regional_placement
from skippipe_scheduler.slots.region_groups import grouped_placements
from skippipe_scheduler.slots.replica_order import order_replicas
from skippipe_scheduler.slots.routes import balanced_sequences, priced_routes
from skippipe_scheduler.slots.slot_model import SlotCosts, SlotModel, SlotPlacement
from skippipe_scheduler.slots.solution import Solution

_LARGE_TASKS = 20_000
"""Tasks from which a repeatable search constructs the first schedule alone. Chosen: one takes seconds."""


@dataclass(frozen=True)
class Constructed:
    """A schedule, and the search that stands at it."""

    search: LocalSearch
    solution: Solution


def construct_schedules(
    slot_model: SlotModel,
    budget: Budget,
    seed: int,
    robustness: Robustness | None = None,
    announce: Callable[[Solution], None] | None = None,
    *,
    few_sequences: bool = True,
) -> list[Constructed]:
    """Return schedules with different placements, the best first: as many as `budget` has time for, one at least.

    `announce` is told of each as soon as it is there; `few_sequences` as for `balanced_sequences`.
    """
    found: list[Constructed] = []
    sequences = balanced_sequences(slot_model, seed, few=few_sequences)
    for placement in _placements(slot_model):
        search = LocalSearch(slot_model, seed, robustness, repeatable=budget.repeatable)
        routes = priced_routes(SlotCosts(slot_model, placement), seed, sequences)
        found.append(Constructed(search, search.start(placement, routes)))
        if announce is not None:
            announce(found[-1].solution)
        if budget.exhausted or (budget.repeatable and slot_model.num_tasks > _LARGE_TASKS):
            break
    return sorted(found, key=lambda constructed: constructed.solution.key)


def promise_s(slot_model: SlotModel) -> float:
    """Return the seconds that the most promising placement promises: no bound, but much tells much from little."""
    return _promise_s(SlotCosts(slot_model, _placements(slot_model)[0]))


def _placements(slot_model: SlotModel) -> list[SlotPlacement]:
    """Return placements, the most promising first."""
    given = slot_model.given_placement()
    if given is not None:
        return [order_replicas(slot_model, given)]
    found = dict.fromkeys([regional_placement(slot_model), *grouped_placements(slot_model)])
    return sorted(found, key=lambda placement: _promise_s(SlotCosts(slot_model, placement)))


def _promise_s(costs: SlotCosts) -> float:
    """Return the slowest reduction and the mean transfers of a microbatch that goes on to the nearest replica."""
    origins, *others = costs.slot_model.slots_of
    total_s = 0.0
    for origin in origins:
        here = origin
        for slots in others:
            nearest = min(slots, key=lambda slot: costs.both_ways_s(here, slot))
            total_s += costs.both_ways_s(here, nearest)
            here = nearest
        total_s += costs.both_ways_s(here, origin)
    return max(costs.reduce_s) + total_s / len(origins)
