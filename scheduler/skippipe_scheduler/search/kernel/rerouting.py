"""Other replicas for the stages of a route: those through which a microbatch gets cheaply past what is there already.

A shortest path where the time of an edge depends on when it is taken (Cooke and Halsey, "The Shortest Route through a
Network with Time-Dependent Internodal Transit Times", 1966), from stage to stage of the route. A label is a replica
with the end of the forward there. When backwards run is not known before the whole route is, so on the way back only
what nothing delays counts; and only the cheapest labels of a stage go on (beam search).

It costs the seconds for which forwards wait, those of transfers and those of work, each both ways and with a weight.
Work weighs least: the fast nodes are for those who come later, too, while a slow link gets no faster for being left.
"""

import math

from skippipe_scheduler.search.kernel.arrays import (
    BACKWARD,
    COST,
    DURATION,
    END_OF_FORWARD,
    FORWARD,
    PROMISE,
    START,
    TRANSFER_S,
    WEIGHT,
    Instance,
    Schedule,
    Work,
)
from skippipe_scheduler.search.kernel.constants import LABELS, LINK_COST, WORK_COST
from skippipe_scheduler.search.kernel.insertion import find, gap_from, room_from
from skippipe_scheduler.search.kernel.jit import called


@called
def find_rerouted(p: Instance, s: Schedule, w: Work, m: int, wait_s: float, limit_s: float) -> bool:
    """Find a place as `insertion.find` does, on other replicas where `m` ends earlier there; its origin stays.

    They are looked for from when the origin has room: the other route may have had to wait there for its replicas.
    """
    if not find(p, s, w.chain_s, m, wait_s, limit_s):
        return False
    length = s.lengths[m]
    last = 2 * length
    end_s = w.chain_s[START, last] + w.chain_s[DURATION, last]
    for hop in range(length):
        w.route[hop] = s.routes[m, hop]
    begin_s = min(w.chain_s[START, 0], _first_room_s(p, s, w, s.routes[m, 0], end_s))
    if not _take_cheapest(p, s, w, m, begin_s, end_s):
        return True
    better = find(p, s, w.chain_s, m, wait_s, end_s)
    if not better or w.chain_s[START, last] + w.chain_s[DURATION, last] > end_s:
        for hop in range(length):
            s.routes[m, hop] = w.route[hop]
        find(p, s, w.chain_s, m, wait_s, limit_s)
    return True


@called
def _first_room_s(p: Instance, s: Schedule, w: Work, slot: int, end_s: float) -> float:
    """Return when the origin first has time for a forward and room until `end_s`."""
    taken_s = w.chain_s[DURATION, 0] + p.overhead_s
    begin_s = gap_from(s, slot, 0.0, taken_s)
    room_s = room_from(p, s, slot, begin_s, end_s)
    while room_s > begin_s:
        begin_s = gap_from(s, slot, room_s, taken_s)
        room_s = room_from(p, s, slot, begin_s, end_s)
    return begin_s


@called
def _take_cheapest(p: Instance, s: Schedule, w: Work, m: int, begin_s: float, end_s: float) -> bool:
    """Let the route of `m`, which begins at `begin_s` and may end at `end_s`, go through the cheapest replicas.

    Returns whether these are others.
    """
    slot = s.routes[m, 0]
    node = s.placement[slot]
    w.labels[0, 0] = slot
    w.labels_s[END_OF_FORWARD, 0, 0] = begin_s + p.node_s[FORWARD, node] * p.stages[WEIGHT, 0]
    w.labels_s[PROMISE, 0, 0] = w.labels_s[END_OF_FORWARD, 0, 0] + p.node_s[BACKWARD, node] * p.stages[WEIGHT, 0]
    w.labels_s[COST, 0, 0] = 0.0
    length = s.lengths[m]
    count = 1
    for hop in range(1, length):
        count = _label(p, s, w, hop, p.stage_of[s.routes[m, hop]], count, end_s, hop == length - 1)
    # Back from the cheapest end, which comes first.
    place = 0
    changed = False
    for hop in range(length - 1, 0, -1):
        changed = changed or s.routes[m, hop] != w.labels[hop, place]
        s.routes[m, hop] = w.labels[hop, place]
        place = w.parents[hop, place]
    return changed


@called
def _label(p: Instance, s: Schedule, w: Work, hop: int, stage: int, before: int, end_s: float, last: bool) -> int:
    """Write labels of the replicas of `stage`, the next after `before` ones of the hop before it; return how many.

    From the `last` hop it goes on to the loss at the origin, and back.
    """
    count = 0
    origin = s.placement[w.labels[0, 0]]
    for slot in range(p.first_slot[stage], p.first_slot[stage + 1]):
        node = s.placement[slot]
        # It comes from the label from which it costs least.
        parent = 0
        cost_s = math.inf
        for place in range(before):
            source = s.placement[w.labels[hop - 1, place]]
            both_s = p.links[TRANSFER_S, source, node] + p.links[TRANSFER_S, node, source]
            if w.labels_s[COST, hop - 1, place] + LINK_COST * both_s < cost_s:
                parent = place
                cost_s = w.labels_s[COST, hop - 1, place] + LINK_COST * both_s
        source = s.placement[w.labels[hop - 1, parent]]
        arrival_s = w.labels_s[END_OF_FORWARD, hop - 1, parent] + p.links[TRANSFER_S, source, node]
        forward_s = p.node_s[FORWARD, node] * p.stages[WEIGHT, stage]
        backward_s = p.node_s[BACKWARD, node] * p.stages[WEIGHT, stage]
        back_s = w.labels_s[PROMISE, hop - 1, parent] - w.labels_s[END_OF_FORWARD, hop - 1, parent]
        back_s += p.links[TRANSFER_S, node, source]
        if last:
            cost_s += LINK_COST * (p.links[TRANSFER_S, node, origin] + p.links[TRANSFER_S, origin, node])
        cost_s += WORK_COST * (forward_s + backward_s)
        if count == LABELS and cost_s >= w.labels_s[COST, hop, count - 1]:
            continue
        # The forward waits for its node, and for room there until the backward, `back_s` before the end.
        start_s = gap_from(s, slot, arrival_s, forward_s + p.overhead_s)
        room_s = room_from(p, s, slot, start_s, max(start_s + forward_s, end_s - back_s))
        if room_s > start_s:
            start_s = gap_from(s, slot, room_s, forward_s + p.overhead_s)
        cost_s += start_s - arrival_s
        promise_s = start_s + forward_s + backward_s + back_s
        count = _keep(w, hop, count, cost_s, promise_s, start_s + forward_s, slot, parent)
    return count


@called
def _keep(w: Work, hop: int, count: int, cost_s: float, promise_s: float, end_s: float, slot: int, parent: int) -> int:
    """Put a label among the `count` of its hop, the cheapest first; return how many are left."""
    place = count
    if count == LABELS:
        place -= 1
        if cost_s >= w.labels_s[COST, hop, place]:
            return count
    while place > 0 and w.labels_s[COST, hop, place - 1] > cost_s:
        w.labels[hop, place] = w.labels[hop, place - 1]
        w.parents[hop, place] = w.parents[hop, place - 1]
        w.labels_s[PROMISE, hop, place] = w.labels_s[PROMISE, hop, place - 1]
        w.labels_s[COST, hop, place] = w.labels_s[COST, hop, place - 1]
        w.labels_s[END_OF_FORWARD, hop, place] = w.labels_s[END_OF_FORWARD, hop, place - 1]
        place -= 1
    w.labels[hop, place] = slot
    w.parents[hop, place] = parent
    w.labels_s[PROMISE, hop, place] = promise_s
    w.labels_s[COST, hop, place] = cost_s
    w.labels_s[END_OF_FORWARD, hop, place] = end_s
    return min(count + 1, LABELS)
