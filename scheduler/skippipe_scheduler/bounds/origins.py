"""Bounds from the origins alone: each must carry its microbatches through their round trips, a few at a time."""

import math
from collections.abc import Callable

from skippipe_scheduler.bounds.network import Network
from skippipe_scheduler.bounds.shares import least_time_of_best_s, least_time_s
from skippipe_scheduler.bounds.walks import Trips, shortest_trips


def trip_s(network: Network, trips: Trips, origin: int, count: int) -> float:
    """Return the least round trip of the origin's microbatches, and the reduction of its stage after it.

    `origin` counts the nodes that can be origins.
    """
    return float(trips.trip_s[origin]) + network.reduce_s[0] if count else 0.0


def waves_s(network: Network, trips: Trips, origin: int, count: int) -> float:
    """Return the least time for an origin with `count` microbatches and memory for M at a time.

    The times at which it holds them are intervals of which at most M overlap, so they can be given M colours, none
    overlapping another of its colour. With w = ceil(count / M), either some colour has more than w intervals, or
    r = count - M (w - 1) colours have w: the first starts of these are a forward and an overhead apart, their last
    ends a backward and an overhead, so one of them starts or ends by r - 1 of these later than could be.
    An interval lasts at least the round trip, and an overhead lies between two of one colour.
    """
    if not count:
        return 0.0
    node, least_s, overhead_s = int(network.origins[origin]), float(trips.trip_s[origin]), network.overhead_s
    memory = int(network.memory[node])
    waves = math.ceil(count / memory)
    staggered = count - memory * (waves - 1) - 1
    apart_s = max(network.forward_s[0][node], network.backward_s[0][node]) + overhead_s
    longer_s = staggered * float(apart_s)
    if waves < count:
        longer_s = min(longer_s, least_s + overhead_s)
    return waves * least_s + (waves - 1) * overhead_s + longer_s + network.reduce_s[0]


def over_origins_s(network: Network, time_s: Callable[[int, int], float]) -> float:
    """Return the least time of all origins together, when `time_s(origin, count)` is that of one with its count.

    With a free placement, of the best set of origins; with free counts, of the best counts.
    """
    candidates, size = range(len(network.origins)), network.problem.sizes[0]
    if network.problem.free_origins:
        if network.fixed:
            return least_time_s(time_s, candidates, network.num_microbatches)
        return least_time_of_best_s(time_s, candidates, size, network.num_microbatches)
    if network.fixed:
        return max(time_s(origin, count) for origin, count in enumerate(network.counts))
    needed = sorted(count for count in network.counts if count)
    ranked = {count: sorted(time_s(origin, count) for origin in candidates) for count in set(needed)}
    return max(ranked[count][len(needed) - place - 1] for place, count in enumerate(needed))


def by_need(network: Network, trips: Trips) -> list[tuple[int, int]]:
    """Return origins and counts whose schedules decide the bound, most needed first: the slowest origins or, where the
    best nodes become origins, the fastest.
    """
    if network.problem.free_origins:
        return []
    counts = network.counts if network.fixed else (network.least_count,) * len(network.origins)
    sign = -1 if network.fixed else 1
    return sorted(enumerate(counts), key=lambda pair: sign * waves_s(network, trips, *pair))


def explain_origin(network: Network, bound_s: float) -> str:
    """Return which origin is bound by its round trips, and what would help."""
    if network.problem.free_origins:
        return (
            f"However the origins divide {network.num_microbatches} microbatches, their round trips in waves take "
            f"{bound_s:.3g} s: give them memory for more, or nearer replicas of the stages that their routes visit."
        )
    origin, count = _slowest_origin(network)
    node = int(network.origins[origin])
    memory = int(network.memory[node])
    waves = math.ceil(count / memory)
    trip_s = float(shortest_trips(network).trip_s[origin])
    cure = f", or memory for {math.ceil(count / (waves - 1))}" if waves > 1 else ""
    where = "origin" if network.fixed else "even with the best origins,"
    return (
        f"{where.capitalize()} {network.problem.nodes[node]} is bound by its round trip of {trip_s:.3g} s in {waves} "
        f"wave{'s' * (waves != 1)} ({count} microbatches, memory for {memory}): no plan is shorter than "
        f"{bound_s:.3g} s. Give it fewer microbatches{cure}, or nearer replicas of the stages that it visits."
    )


def _slowest_origin(network: Network) -> tuple[int, int]:
    """Return the origin that binds and its microbatches (with a free placement, the last of the best ones)."""
    trips, size = shortest_trips(network), network.problem.sizes[0]
    counts = network.counts if network.fixed else (network.greatest_count,) * len(network.origins)
    order = sorted(range(len(counts)), key=lambda origin: waves_s(network, trips, origin, counts[origin]))
    binding = order[-1] if network.fixed else order[size - 1]
    return binding, counts[binding]
