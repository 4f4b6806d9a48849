"""Other replicas for the stages of a route: those through which a microbatch gets fastest past what is there already.

A shortest path where the time of an edge depends on when it is taken (Cooke and Halsey, "The Shortest Route through a
Network with Time-Dependent Internodal Transit Times", 1966), from stage to stage of the route. A label is a replica
with the end of the forward there. When backwards run is not known before the whole route is, so on the way back only
what nothing delays counts; and only the most promising labels of a stage go on (beam search).
"""

import math

from skippipe_scheduler.search.kernel.arrays import (
    BACKWARD,
    DURATION,
    END_OF_FORWARD,
    FORWARD,
    LOSS,
    PROMISE,
    START,
    TRANSFER_S,
    WEIGHT,
    Instance,
    Schedule,
    Work,
)
from skippipe_scheduler.search.kernel.constants import LABELS
from skippipe_scheduler.search.kernel.insertion import find, gap_from, room_from
from skippipe_scheduler.search.kernel.jit import called


@called
def find_rerouted(p: Instance, s: Schedule, w: Work, m: int, wait_s: float, limit_s: float) -> bool:
    """Find a place as `insertion.find` does, on other replicas where `m` ends earlier there; its origin stays."""
    if not find(p, s, w.chain_s, m, wait_s, limit_s):
        return False
    length = s.lengths[m]
    last = 2 * length
    end_s = w.chain_s[START, last] + w.chain_s[DURATION, last]
    for hop in range(length):
        w.route[hop] = s.routes[m, hop]
    if not _take_fastest(p, s, w, m, w.chain_s[START, 0], end_s):
        return True
    better = find(p, s, w.chain_s, m, wait_s, end_s)
    if not better or w.chain_s[START, last] + w.chain_s[DURATION, last] > end_s:
        for hop in range(length):
            s.routes[m, hop] = w.route[hop]
        find(p, s, w.chain_s, m, wait_s, limit_s)
    return True


@called
def _take_fastest(p: Instance, s: Schedule, w: Work, m: int, begin_s: float, end_s: float) -> bool:
    """Let the route of `m`, which begins at `begin_s` and may end at `end_s`, go through the fastest replicas.

    Returns whether these are others.
    """
    slot = s.routes[m, 0]
    node = s.placement[slot]
    w.labels[0, 0] = slot
    w.labels_s[END_OF_FORWARD, 0, 0] = begin_s + p.node_s[FORWARD, node] * p.stages[WEIGHT, 0]
    w.labels_s[PROMISE, 0, 0] = w.labels_s[END_OF_FORWARD, 0, 0] + p.node_s[BACKWARD, node] * p.stages[WEIGHT, 0]
    length = s.lengths[m]
    count = 1
    for hop in range(1, length):
        count = _label(p, s, w, hop, p.stage_of[s.routes[m, hop]], count, end_s, hop == length - 1)
    # Back from the most promising end, which comes first.
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
        # It comes from the label with the least sum of what is gone and what is left of the way back.
        parent = 0
        promise_s = math.inf
        arrival_s = 0.0
        for place in range(before):
            source = s.placement[w.labels[hop - 1, place]]
            there_s = p.links[TRANSFER_S, source, node]
            through_s = w.labels_s[PROMISE, hop - 1, place] + there_s + p.links[TRANSFER_S, node, source]
            if through_s < promise_s:
                parent = place
                promise_s = through_s
                arrival_s = w.labels_s[END_OF_FORWARD, hop - 1, place] + there_s
        forward_s = p.node_s[FORWARD, node] * p.stages[WEIGHT, stage]
        back_s = promise_s - arrival_s
        if last:
            promise_s += p.links[TRANSFER_S, node, origin] + p.node_s[LOSS, origin] + p.links[TRANSFER_S, origin, node]
        promise_s += forward_s + p.node_s[BACKWARD, node] * p.stages[WEIGHT, stage]
        if count == LABELS and promise_s >= w.labels_s[PROMISE, hop, count - 1]:
            continue
        # The forward waits for its node, and for room there until the backward, `back_s` before the end.
        start_s = gap_from(s, slot, arrival_s, forward_s + p.overhead_s)
        room_s = room_from(p, s, slot, start_s, max(start_s + forward_s, end_s - back_s))
        if room_s > start_s:
            start_s = gap_from(s, slot, room_s, forward_s + p.overhead_s)
        promise_s += start_s - arrival_s
        count = _keep(w, hop, count, promise_s, start_s + forward_s, slot, parent)
    return count


@called
def _keep(w: Work, hop: int, count: int, promise_s: float, end_s: float, slot: int, parent: int) -> int:
    """Put a label among the `count` of its hop, the most promising first; return how many are left."""
    place = count
    if count == LABELS:
        place -= 1
        if promise_s >= w.labels_s[PROMISE, hop, place]:
            return count
    while place > 0 and w.labels_s[PROMISE, hop, place - 1] > promise_s:
        w.labels[hop, place] = w.labels[hop, place - 1]
        w.parents[hop, place] = w.parents[hop, place - 1]
        w.labels_s[PROMISE, hop, place] = w.labels_s[PROMISE, hop, place - 1]
        w.labels_s[END_OF_FORWARD, hop, place] = w.labels_s[END_OF_FORWARD, hop, place - 1]
        place -= 1
    w.labels[hop, place] = slot
    w.parents[hop, place] = parent
    w.labels_s[PROMISE, hop, place] = promise_s
    w.labels_s[END_OF_FORWARD, hop, place] = end_s
    return min(count + 1, LABELS)
