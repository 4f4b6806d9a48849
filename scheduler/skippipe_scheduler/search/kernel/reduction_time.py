"""Compiled times of gradient reductions; the same as in `problem.gradient_reduction`, where they are explained."""

import math

from skippipe_scheduler.search.kernel.arrays import (
    CAPACITY,
    FIRST_USED,
    GBIT_PER_S,
    HIERARCHICAL,
    LATENCY_S,
    NOBODY,
    REDUCE_GBIT,
    REDUCE_S,
    RING,
    SHARED_CAPACITY,
    SHARED_CARDS,
    TREE,
    USERS,
    Instance,
    Schedule,
    Sharing,
)
from skippipe_scheduler.search.kernel.constants import MOST_NEAREST
from skippipe_scheduler.search.kernel.fair_sharing import used_resource
from skippipe_scheduler.search.kernel.jit import called, inlined

_TO_ALL, _TO_LANES, _BETWEEN, _BACK = 0, 1, 2, 3
"""Who sends to whom in a step: everyone to everyone; and the steps of a reduction by region."""


@inlined
def reduction_s(p: Instance, s: Schedule, sharing: Sharing, stage: int) -> float:
    """Return the all-reduce time of a stage under the schedule's placement."""
    first = p.first_slot[stage]
    count = p.first_slot[stage + 1] - first
    gbit = p.stages[REDUCE_GBIT, stage]
    if gbit == 0 or count == 1:
        return p.stages[REDUCE_S, stage]
    return _by_algorithm_s(p, s, sharing, first, count, gbit)


@called
def _by_algorithm_s(p: Instance, s: Schedule, sharing: Sharing, first: int, count: int, gbit: float) -> float:
    """Return the seconds of a reduction over the slots from `first` on."""
    if p.reduction == RING:
        return _ring_s(p, s, sharing, first, count, gbit)
    if p.reduction == TREE:
        return _tree_s(p, s, sharing, first, count, gbit)
    if p.reduction == HIERARCHICAL:
        return _hierarchical_s(p, s, sharing, first, count, gbit, False)
    if p.contention == SHARED_CAPACITY:
        return 2 * _sent_to_all_s(p, s, sharing, first, count, gbit / count)
    return 2 * _sent_s(p, s, sharing, first, count, gbit / count, _TO_ALL, count, False)


@called
def _sent_to_all_s(p: Instance, s: Schedule, sharing: Sharing, first: int, count: int, gbit: float) -> float:
    """Return the seconds of a step in which all send to all, where they share capacities.

    Nobody has to count messages: each card has one for every other replica, and an uplink those of all that are behind
    it to all that are not.
    """
    nodes, deepest = sharing.uplinks_of.shape
    for slot in range(first, first + count):
        _count_behind(s, sharing, slot, 1)
    slowest_s = 0.0
    for source in range(first, first + count):
        here = s.placement[source]
        for sink in range(first, first + count):
            there = s.placement[sink]
            if source == sink:
                continue
            # Where nothing limits a card, its capacity is infinite.
            narrower = min(sharing.resources[CAPACITY, here], sharing.resources[CAPACITY, nodes + there])
            wire_s = max(gbit / p.links[GBIT_PER_S, here, there], gbit * (count - 1) / narrower)
            for number in range(2, 2 + 2 * deepest):
                resource = used_resource(sharing, here, there, number)
                if resource != NOBODY:
                    behind = sharing.counts[USERS, resource - (resource - 2 * nodes) % 2]
                    users = behind * (count - behind)
                    wire_s = max(wire_s, gbit * users / sharing.resources[CAPACITY, resource])
            slowest_s = max(slowest_s, p.links[LATENCY_S, here, there] + wire_s)
    for slot in range(first, first + count):
        _count_behind(s, sharing, slot, -1)
    return slowest_s


@inlined
def _count_behind(s: Schedule, sharing: Sharing, slot: int, counted: int) -> None:
    """Count, at the way out of each uplink, that the slot's node is behind it; with `counted` -1, no more."""
    nodes, deepest = sharing.uplinks_of.shape
    for depth in range(deepest):
        uplink = sharing.uplinks_of[s.placement[slot], depth]
        if uplink != NOBODY:
            sharing.counts[USERS, 2 * nodes + 2 * uplink] += counted


@called
def loose_reduction_s(p: Instance, s: Schedule, sharing: Sharing, stage: int) -> float:
    """Return a reduction time of a stage that falls with every replica that comes nearer to the others.

    Of a ring it is the mean of two: every step as slow as its slowest message, and every step as slow as their mean.
    Replicas may change their order later, so each is followed by the nearest that is not in the ring yet. Of a
    reduction by region, messages are as if each were alone: to count what they share takes ten times as long.
    """
    first = p.first_slot[stage]
    count = p.first_slot[stage + 1] - first
    gbit = p.stages[REDUCE_GBIT, stage]
    if p.reduction == HIERARCHICAL and gbit > 0 and count > 1:
        return _hierarchical_s(p, s, sharing, first, count, gbit, True)
    if p.reduction != RING or gbit == 0 or count < 3 or count > MOST_NEAREST:
        return reduction_s(p, s, sharing, stage)
    here = first
    visited = 1
    slowest_s = 0.0
    total_s = 0.0
    for _ in range(count - 1):
        following = -1
        nearest_s = math.inf
        for place in range(count):
            if visited >> place & 1:
                continue
            message_s = _message_s(p, s, here, first + place, gbit / count)
            if message_s < nearest_s:
                nearest_s = message_s
                following = place
        visited |= 1 << following
        here = first + following
        slowest_s = max(slowest_s, nearest_s)
        total_s += nearest_s
    closing_s = _message_s(p, s, here, first, gbit / count)
    return (count - 1) * (max(slowest_s, closing_s) + (total_s + closing_s) / count)


@called
def _ring_s(p: Instance, s: Schedule, sharing: Sharing, first: int, count: int, gbit: float) -> float:
    """Return the seconds of a ring over the slots from `first` on: 2 (R - 1) steps of the slowest message."""
    slowest_s = 0.0
    for counted in (1, 0, -1):
        if counted and p.contention != SHARED_CAPACITY:
            continue
        for place in range(count):
            sink = first + (place + 1) % count
            slowest_s = max(slowest_s, _step_s(p, s, sharing, first + place, sink, gbit / count, counted))
    return 2 * (count - 1) * slowest_s


@called
def _tree_s(p: Instance, s: Schedule, sharing: Sharing, first: int, count: int, gbit: float) -> float:
    """Return the seconds of a binomial tree: rounds up to the first slot and back down, each with its slowest edge."""
    total_s = 0.0
    stride = 1
    while stride < count:
        for up in (True, False):
            slowest_s = 0.0
            for counted in (1, 0, -1):
                if counted and p.contention != SHARED_CAPACITY:
                    continue
                for place in range(first, first + count - stride, 2 * stride):
                    source = place + stride if up else place
                    sink = place if up else place + stride
                    slowest_s = max(slowest_s, _step_s(p, s, sharing, source, sink, gbit, counted))
            total_s += slowest_s
        stride *= 2
    return total_s


@called
def _hierarchical_s(
    p: Instance, s: Schedule, sharing: Sharing, first: int, count: int, gbit: float, alone: bool
) -> float:
    """Return the seconds of sums within each region, between the regions in two halves, and back.

    Where `alone`, every message is timed as if there were no other.
    """
    lanes = count
    regions = 0
    for slot in range(first, first + count):
        before = 0
        size = 0
        for other in range(first, first + count):
            if p.region_of[s.placement[other]] == p.region_of[s.placement[slot]]:
                size += 1
                before += other < slot
        sharing.lanes[slot] = before
        lanes = min(lanes, size)
        regions += before == 0
    there_s = _sent_s(p, s, sharing, first, count, gbit / lanes, _TO_LANES, lanes, alone)
    between_s = _sent_s(p, s, sharing, first, count, gbit / lanes / regions, _BETWEEN, lanes, alone)
    return there_s + 2 * between_s + _sent_s(p, s, sharing, first, count, gbit / lanes, _BACK, lanes, alone)


@called
def _sent_s(
    p: Instance, s: Schedule, sharing: Sharing, first: int, count: int, gbit: float, step: int, lanes: int, alone: bool
) -> float:
    """Return the seconds of a step whose messages leave at once; on a shared card one leaves after the other.

    Where they are `alone`, the slowest message alone counts.
    """
    slowest_s = 0.0
    for counted in (1, 0, -1):
        if counted and (alone or p.contention != SHARED_CAPACITY):
            continue
        for source in range(first, first + count):
            for sink in range(first, first + count):
                if not _is_sent(p, s, sharing, source, sink, step, lanes):
                    continue
                if alone:
                    slowest_s = max(slowest_s, _message_s(p, s, source, sink, gbit))
                else:
                    slowest_s = max(slowest_s, _step_s(p, s, sharing, source, sink, gbit, counted))
    if alone or p.contention != SHARED_CARDS:
        return slowest_s
    for source in range(first, first + count):
        latency_s = 0.0
        on_card_s = 0.0
        for sink in range(first, first + count):
            if not _is_sent(p, s, sharing, source, sink, step, lanes):
                continue
            here_s = p.links[LATENCY_S, s.placement[source], s.placement[sink]]
            latency_s = max(latency_s, here_s)
            on_card_s += _message_s(p, s, source, sink, gbit) - here_s
        slowest_s = max(slowest_s, latency_s + on_card_s)
    return slowest_s


@inlined
def _is_sent(p: Instance, s: Schedule, sharing: Sharing, source: int, sink: int, step: int, lanes: int) -> bool:
    """Return whether there is a message from a slot to another one in a step."""
    if step == _TO_ALL or source == sink:
        return source != sink
    near = p.region_of[s.placement[source]] == p.region_of[s.placement[sink]]
    if step == _BETWEEN:
        return not near and sharing.lanes[source] == sharing.lanes[sink] and sharing.lanes[source] < lanes
    return near and sharing.lanes[sink if step == _TO_LANES else source] < lanes


@inlined
def _step_s(p: Instance, s: Schedule, sharing: Sharing, source: int, sink: int, gbit: float, counted: int) -> float:
    """Return the seconds of a message beside the others of its step, which have to be counted first.

    With `counted` 1 or -1 the message is only counted, or no more, at what it shares.
    """
    if p.contention != SHARED_CAPACITY:
        return _message_s(p, s, source, sink, gbit)
    here = s.placement[source]
    there = s.placement[sink]
    wire_s = gbit / p.links[GBIT_PER_S, here, there]
    for number in range(sharing.numbers.shape[0] - FIRST_USED):
        resource = used_resource(sharing, here, there, number)
        if resource == NOBODY:
            continue
        sharing.counts[USERS, resource] += counted
        wire_s = max(wire_s, gbit * sharing.counts[USERS, resource] / sharing.resources[CAPACITY, resource])
    return p.links[LATENCY_S, here, there] + wire_s if counted == 0 else 0.0


@inlined
def _message_s(p: Instance, s: Schedule, source: int, sink: int, gbit: float) -> float:
    """Return the seconds of one message that is alone: latency and bytes over bandwidth."""
    here = s.placement[source]
    there = s.placement[sink]
    return p.links[LATENCY_S, here, there] + gbit / p.links[GBIT_PER_S, here, there]
