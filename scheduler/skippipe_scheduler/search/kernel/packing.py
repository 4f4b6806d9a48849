"""A schedule from nothing, for very many microbatches: the origins take turns, each with what fits best.

A greedy best-fit construction: in the order of the origins' remaining work (the longest first, as in list scheduling),
each turn inserts the one of the origin's next microbatches that is delayed least.
"""

import math

from skippipe_scheduler.search.kernel.anneal import count_visits
from skippipe_scheduler.search.kernel.arrays import (
    BUSY,
    DURATION,
    HELD,
    START,
    Instance,
    Integers,
    Queue,
    Schedule,
    Work,
)
from skippipe_scheduler.search.kernel.insertion import commit, find, fits_width
from skippipe_scheduler.search.kernel.jit import called, compiled
from skippipe_scheduler.search.kernel.tasks import round_trip_s
from skippipe_scheduler.search.kernel.timing import retime


@compiled
def pack(
    p: Instance, s: Schedule, w: Work, q: Queue, turns: Integers, members: Integers, wait_s: float, choices: int
) -> bool:
    """Insert all microbatches into an empty schedule: at each of `turns`, one of that origin's.

    Of the next `choices` of the origin (its row of `members`, -1 after the last) it is the one that is delayed least:
    whose end, less its round trip, is earliest. Returns False where a slot would get more tasks than its row holds.
    """
    for slot in range(s.placement.shape[0]):
        s.counts[BUSY, slot] = 0
        s.counts[HELD, slot] = 0
    for turn in range(turns.shape[0]):
        origin = turns[turn]
        place = _best_fit(p, s, w, members[origin], wait_s, choices)
        m = members[origin, place]
        if not fits_width(s, m):
            return False
        find(p, s, w.chain_s, m, wait_s, math.inf)
        commit(p, s, w.chain_s, m)
        # The others of the origin close up, and keep their sequence.
        last = place
        while last + 1 < members.shape[1] and members[origin, last + 1] >= 0:
            members[origin, last] = members[origin, last + 1]
            last += 1
        members[origin, last] = -1
    count_visits(p, s, w)
    return retime(p, s, q, -1)


@called
def _best_fit(p: Instance, s: Schedule, w: Work, members: Integers, wait_s: float, choices: int) -> int:
    """Return the place in `members` of the microbatch that would end least long after its round trip alone."""
    best = 0
    if choices == 1:
        return best
    least_s = math.inf
    for place in range(min(choices, members.shape[0])):
        m = members[place]
        if m < 0:
            break
        trip_s = round_trip_s(p, s, m)
        # Whoever cannot be better than the best so far is given up as soon as that is clear.
        if find(p, s, w.chain_s, m, wait_s, least_s + trip_s):
            last = 2 * s.lengths[m]
            delay_s = w.chain_s[START, last] + w.chain_s[DURATION, last] - trip_s
            if delay_s < least_s:
                least_s = delay_s
                best = place
    return best
