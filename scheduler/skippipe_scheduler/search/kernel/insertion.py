"""The repair operator: whole microbatches put into a schedule at the earliest feasible place, and taken out of it.

A serial schedule generation scheme (Kolisch and Hartmann, 1999): one microbatch after the other gets the earliest
place that those before it leave, task by task along its chain. Two demands come on top. A node holds a microbatch from
the start of its forward to the end of its backward, and has room for few; and no task may wait long for its node,
because then the microbatch fills the memory of all nodes before it. Where the greedy chain breaks one of them, the
forward concerned gets a later release and the chain is placed again.

Inserting all tasks of a microbatch at once, instead of dispatching task by task, never fills the memory of nodes that
then wait for each other: the tasks of a schedule always have a global order, so no plan made here can deadlock.
"""

import math

from skippipe_scheduler.search.kernel.arrays import (
    BUSY,
    BUSY_FROM,
    BUSY_TO,
    DELAY,
    DURATION,
    HELD,
    HELD_FROM,
    HELD_TO,
    INDEX_BITS,
    LENGTH,
    RELEASE,
    START,
    Floats,
    Instance,
    Schedule,
    Work,
)
from skippipe_scheduler.search.kernel.constants import EPSILON_S, FEW_ATTEMPTS, MANY_ATTEMPTS, NO_LIMIT_S
from skippipe_scheduler.search.kernel.jit import called, inlined
from skippipe_scheduler.search.kernel.tasks import delay_s, duration_s, hop_of, only_relays, slot_of


@called
def find(p: Instance, s: Schedule, chain_s: Floats, m: int, wait_s: float, limit_s: float) -> bool:
    """Write the earliest place for all tasks of `m` into `chain_s`; no task waits more than `wait_s` for its node.

    Returns False where after an attempt in vain `m` would end after `limit_s`, or where with a limit no place is found
    in a few attempts; a place found at once may end later.
    """
    length = s.lengths[m]
    for index in range(2 * length + 1):
        chain_s[DURATION, index] = duration_s(p, s, m, index)
        chain_s[DELAY, index] = delay_s(p, s, m, index)
    for hop in range(length):
        chain_s[RELEASE, hop] = 0.0
    first = 0
    for _ in range(MANY_ATTEMPTS if limit_s == math.inf else FEW_ATTEMPTS):
        # Only what comes behind the first release that moved has to be placed again.
        first = _delayed(p, s, chain_s, m, wait_s, first)
        if first < 0:
            return True
        if chain_s[START, 2 * length] + chain_s[DURATION, 2 * length] > limit_s:
            return False
    if limit_s < math.inf:
        return False
    # No place between the others: behind all of them there always is one.
    end_s = 0.0
    for slot in range(s.placement.shape[0]):
        if s.counts[BUSY, slot]:
            end_s = max(end_s, s.times_s[BUSY_TO, slot, s.counts[BUSY, slot] - 1])
    for hop in range(length):
        chain_s[RELEASE, hop] = end_s
    _place(p, s, chain_s, m, wait_s, 0)
    return True


@called
def _delayed(p: Instance, s: Schedule, chain_s: Floats, m: int, wait_s: float, first: int) -> int:
    """Place the chain from hop `first` on after its releases; where that cannot be, move the releases on.

    Returns the first hop whose release has moved, from which the chain has to be placed again; -1 where it fits.
    """
    excess_s = _place(p, s, chain_s, m, wait_s, first)
    length = s.lengths[m]
    moved = length
    if excess_s > EPSILON_S:
        # Someone waits too long: the whole chain starts later by as much.
        chain_s[RELEASE, 0] = chain_s[START, 0] + excess_s
        moved = 0
    for hop in range(length):
        if only_relays(s, m, hop):
            continue
        last = 2 * length - hop
        end_s = chain_s[START, last] + chain_s[DURATION, last]
        # No room for as long as this hop would hold the microbatch: its forward waits for the next end of a stay.
        room_s = room_from(p, s, s.routes[m, hop], chain_s[START, hop], end_s)
        if room_s > chain_s[START, hop]:
            chain_s[RELEASE, hop] = max(chain_s[RELEASE, hop], room_s)
            moved = min(moved, hop)
    return moved if moved < length else -1


@called
def _place(p: Instance, s: Schedule, chain_s: Floats, m: int, wait_s: float, first: int) -> float:
    """Write greedy starts of the chain from hop `first` on; return by how much the longest wait exceeds `wait_s`."""
    length = s.lengths[m]
    now_s = 0.0
    if first:
        now_s = chain_s[START, first - 1] + chain_s[DURATION, first - 1] + chain_s[DELAY, first - 1]
    excess_s = 0.0
    for index in range(first, 2 * length + 1):
        slot = slot_of(s, m, index)
        arrival_s = now_s
        if index < length:
            now_s = max(now_s, chain_s[RELEASE, index])
        else:
            # The node still pays its overhead for this microbatch's task before.
            before = length if index == 2 * length else hop_of(index, length)
            now_s = max(now_s, chain_s[START, before] + chain_s[DURATION, before] + p.overhead_s)
        now_s = gap_from(s, slot, now_s, chain_s[DURATION, index] + p.overhead_s)
        if index:
            excess_s = max(excess_s, now_s - arrival_s - wait_s)
        chain_s[START, index] = now_s
        now_s += chain_s[DURATION, index] + chain_s[DELAY, index]
    return excess_s


@inlined
def gap_from(s: Schedule, slot: int, now_s: float, taken_s: float) -> float:
    """Return the earliest start from `now_s` on at which the slot is free for `taken_s`."""
    count = s.counts[BUSY, slot]
    # By bisection the first task that starts at `now_s` or later.
    low = 0
    high = count
    while low < high:
        middle = (low + high) // 2
        if s.times_s[BUSY_FROM, slot, middle] < now_s:
            low = middle + 1
        else:
            high = middle
    # The task before it may still run; then one gap after the other, until one is long enough.
    if low and s.times_s[BUSY_TO, slot, low - 1] > now_s:
        now_s = s.times_s[BUSY_TO, slot, low - 1]
    while low < count and s.times_s[BUSY_FROM, slot, low] < now_s + taken_s - EPSILON_S:
        now_s = max(now_s, s.times_s[BUSY_TO, slot, low])
        low += 1
    return now_s


@called
def room_from(p: Instance, s: Schedule, slot: int, first_s: float, last_s: float) -> float:
    """Return `first_s` if the slot can hold one more over the whole interval, else when to try again.

    The stays are in order of their starts. What is held rises only where a stay starts, so it is enough to count there
    and at `first_s`. No interval fits that contains a full moment: the next try begins after the latest of them, where
    the first of its stays ends.
    """
    memory = p.memory[s.placement[slot]]
    # The stays that overlap the interval are among those from `low` to `high`; fewer than fill the memory never do.
    near = 0
    low = s.counts[HELD, slot]
    high = -1
    for index in range(s.counts[HELD, slot]):
        if s.times_s[HELD_FROM, slot, index] >= last_s:
            break
        if s.times_s[HELD_TO, slot, index] > first_s:
            near += 1
            low = min(low, index)
            high = index
    if near < memory:
        return first_s
    # From the latest start to the earliest, and last (index low - 1) the moment `first_s` itself.
    for index in range(high, low - 2, -1):
        at_s = first_s
        if index >= low:
            if s.times_s[HELD_TO, slot, index] <= first_s:
                continue
            at_s = max(first_s, s.times_s[HELD_FROM, slot, index])
        # How many are held at that moment, and when the first of them ends: before that nobody fits in.
        full = 0
        end_s = NO_LIMIT_S
        for other in range(low, high + 1):
            if s.times_s[HELD_FROM, slot, other] > at_s:
                break
            if s.times_s[HELD_TO, slot, other] > at_s:
                full += 1
                end_s = min(end_s, s.times_s[HELD_TO, slot, other])
        if full >= memory:
            return end_s
    return first_s


@called
def commit(p: Instance, s: Schedule, chain_s: Floats, m: int) -> None:
    """Put all tasks of `m` at the starts in `chain_s`."""
    length = s.lengths[m]
    for index in range(2 * length + 1):
        slot = slot_of(s, m, index)
        start_s = chain_s[START, index]
        end_s = start_s + chain_s[DURATION, index] + p.overhead_s
        # Insertion into the row, which is in order of time: later tasks move on by one place.
        place = s.counts[BUSY, slot]
        while place > 0 and _comes_before(s, slot, place - 1, start_s, end_s):
            s.times_s[BUSY_FROM, slot, place] = s.times_s[BUSY_FROM, slot, place - 1]
            s.times_s[BUSY_TO, slot, place] = s.times_s[BUSY_TO, slot, place - 1]
            s.tasks[BUSY, slot, place] = s.tasks[BUSY, slot, place - 1]
            place -= 1
        s.times_s[BUSY_FROM, slot, place] = start_s
        s.times_s[BUSY_TO, slot, place] = end_s
        s.tasks[BUSY, slot, place] = m << INDEX_BITS | index
        s.counts[BUSY, slot] += 1
        s.starts[m, index] = start_s
    for hop in range(length):
        if not only_relays(s, m, hop):
            last = 2 * length - hop
            _hold(s, s.routes[m, hop], m, chain_s[START, hop], chain_s[START, last] + chain_s[DURATION, last])


@inlined
def _comes_before(s: Schedule, slot: int, place: int, start_s: float, end_s: float) -> bool:
    """Return whether a task goes before the one at `place`; one without length goes before one that starts with it."""
    other_s = s.times_s[BUSY_FROM, slot, place]
    if other_s > start_s:
        return True
    return end_s == start_s and other_s == start_s and s.times_s[BUSY_TO, slot, place] > other_s


@called
def _hold(s: Schedule, slot: int, m: int, start_s: float, end_s: float) -> None:
    """Put the stay of `m` at a slot into its row, which is in order of starts."""
    place = s.counts[HELD, slot]
    while place > 0 and s.times_s[HELD_FROM, slot, place - 1] > start_s:
        s.times_s[HELD_FROM, slot, place] = s.times_s[HELD_FROM, slot, place - 1]
        s.times_s[HELD_TO, slot, place] = s.times_s[HELD_TO, slot, place - 1]
        s.tasks[HELD, slot, place] = s.tasks[HELD, slot, place - 1]
        place -= 1
    s.times_s[HELD_FROM, slot, place] = start_s
    s.times_s[HELD_TO, slot, place] = end_s
    s.tasks[HELD, slot, place] = m
    s.counts[HELD, slot] += 1


@inlined
def _take_out(s: Schedule, kind: int, slot: int, entry: int) -> None:
    """Take an entry out of a slot's row of `BUSY` tasks or `HELD` microbatches; those behind it close up."""
    place = 0
    while s.tasks[kind, slot, place] != entry:
        place += 1
    s.counts[kind, slot] -= 1
    for later in range(place, s.counts[kind, slot]):
        s.tasks[kind, slot, later] = s.tasks[kind, slot, later + 1]
        s.times_s[2 * kind, slot, later] = s.times_s[2 * kind, slot, later + 1]
        s.times_s[2 * kind + 1, slot, later] = s.times_s[2 * kind + 1, slot, later + 1]


@called
def remove(s: Schedule, m: int) -> None:
    """Take all tasks of `m` out; everything else stays in its place."""
    length = s.lengths[m]
    for index in range(2 * length + 1):
        _take_out(s, BUSY, slot_of(s, m, index), m << INDEX_BITS | index)
    for hop in range(length):
        if not only_relays(s, m, hop):
            _take_out(s, HELD, s.routes[m, hop], m)


@called
def restore(p: Instance, s: Schedule, w: Work, m: int, saved: int) -> None:
    """Put `m` back on the route and at the starts saved in row `saved`."""
    s.lengths[m] = w.saved[saved, LENGTH]
    for hop in range(s.lengths[m]):
        s.routes[m, hop] = w.saved[saved, hop]
    for index in range(2 * s.lengths[m] + 1):
        w.chain_s[START, index] = w.saved_s[saved, index]
        w.chain_s[DURATION, index] = duration_s(p, s, m, index)
    commit(p, s, w.chain_s, m)


@called
def fits_width(s: Schedule, m: int) -> bool:
    """Return whether the rows of all slots on the route of `m` have room for its tasks."""
    for hop in range(s.lengths[m]):  # noqa: SIM110  # numba compiles no generator expressions here
        if s.counts[BUSY, s.routes[m, hop]] + 3 > s.tasks.shape[2]:
            return False
    return True
