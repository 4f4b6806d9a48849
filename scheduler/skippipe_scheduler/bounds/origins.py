"""Bounds from the origins alone: each must carry its microbatches through their round trips, a few at a time."""

import math
from collections.abc import Callable

from skippipe_scheduler.bounds.network import Network
from skippipe_scheduler.bounds.shares import least_time_of_best_s, least_time_s
from skippipe_scheduler.bounds.walks import Trips


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
