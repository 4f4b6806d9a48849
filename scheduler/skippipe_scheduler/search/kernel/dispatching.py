"""A schedule event by event, with transfers that share what they share: whenever a node is free, it starts what waits.

The rule is `loss_first` of `baselines.dispatch`, which knows nothing of sharing: a loss, then backwards, then forwards
for which there is room, and of these the one that came first. Here a task comes when its message has arrived among all
others.
"""

import math
from typing import Final, NamedTuple

import numpy as np

from skippipe_scheduler.search.kernel.arrays import (
    BUSY,
    BUSY_FROM,
    BUSY_TO,
    CARD_IN,
    CARD_OUT,
    GBIT_PER_S,
    HELD,
    INDEX_BITS,
    INDEX_MASK,
    LATENCY_S,
    NOBODY,
    NOT_SHARED,
    OCCUPANCY_S,
    SHARED_CAPACITY,
    SHARED_CARDS,
    TRANSFER_S,
    Floats,
    Instance,
    Integers,
    Queue,
    Schedule,
)
from skippipe_scheduler.search.kernel.fair_sharing import clear, next_end_s, next_to_end, offer, set_out, stop, take_off
from skippipe_scheduler.search.kernel.jit import called, compiled, inlined
from skippipe_scheduler.search.kernel.tasks import duration_s, hop_of, only_relays
from skippipe_scheduler.search.kernel.timing import begin_stay, end_stay, occupy_s, push, take_next

_WAITING, _HELD, _RUNNING, _TOUCHED = 0, 1, 2, 3
ANY_NUMBER: Final = 1 << 40
"""Of microbatches: no limit."""
_FREE, _ARRIVES, _LEAVES = 0, 1, 2
_KIND_BITS = 2


class Dispatching(NamedTuple):
    """Memory for a dispatch."""

    arrived_s: Floats  # (slots, width) when each of the tasks that wait came
    waiting: Integers  # (slots, width)
    state: Integers  # (WAITING | HELD | RUNNING | TOUCHED, slots)
    event_s: Floats  # (M + slots + 1,) heap of what happens next
    events: Integers  # (M + slots + 1,) a task or slot, shifted, and what happens to it


def make_dispatching(microbatches: int, slots: int, width: int) -> Dispatching:
    """Return memory for schedules of this size."""
    return Dispatching(
        arrived_s=np.zeros((slots, width)),
        waiting=np.zeros((slots, width), np.int64),
        state=np.zeros((4, slots), np.int64),
        event_s=np.zeros(microbatches + slots + 1),
        events=np.zeros(microbatches + slots + 1, np.int64),
    )


@compiled
def dispatch(p: Instance, s: Schedule, q: Queue, d: Dispatching, most_begun: int) -> bool:
    """Fill a schedule for its placement and routes, as `retime` would for the order that comes out.

    An origin has at most `most_begun` microbatches under way. Returns False where nodes wait for each other for ever,
    or a slot gets more tasks than its row holds.
    """
    _begin(p, s, q, d)
    pending = 0
    total = 0
    for m in range(s.routes.shape[0]):
        push(d.event_s, d.events, pending, 0.0, m << INDEX_BITS << _KIND_BITS | _ARRIVES)
        pending += 1
        total += 2 * s.lengths[m] + 1
    started = 0
    touched = 0
    while True:
        left_s = next_end_s(q.sharing) if p.contention == SHARED_CAPACITY else math.inf
        event_s = d.event_s[0] if pending else math.inf
        now_s = min(left_s, event_s)
        if now_s == math.inf:
            break
        slot = NOBODY
        if left_s < event_s:
            pending = _arrive_shared(p, s, q, d, pending, now_s)
        else:
            number = take_next(d.event_s, d.events, pending)
            pending -= 1
            kind = number & ((1 << _KIND_BITS) - 1)
            task = number >> _KIND_BITS
            if kind == _FREE:
                slot = task
                _let_go(s, d, slot)
            elif kind == _LEAVES:
                pending = _leave(p, s, q, d, pending, task, now_s)
            else:
                slot = s.routes[task >> INDEX_BITS, hop_of(task & INDEX_MASK, s.lengths[task >> INDEX_BITS])]
                if not _wait(d, slot, task, now_s):
                    return False
        if slot != NOBODY and d.state[_TOUCHED, slot] == 0:
            d.state[_TOUCHED, slot] = 1
            q.position[touched] = slot
            touched += 1
        # Whatever happens at the same time is there before anyone chooses.
        if pending and d.event_s[0] == now_s:
            continue
        for index in range(touched):
            slot = q.position[index]
            d.state[_TOUCHED, slot] = 0
            if d.state[_RUNNING, slot] == NOBODY:
                place = _choose(p, s, d, slot, most_begun)
                if place != NOBODY:
                    if s.counts[BUSY, slot] == s.tasks.shape[2]:
                        return False
                    pending = _start(p, s, d, slot, place, now_s, pending)
                    started += 1
        touched = 0
    return started == total


@called
def _begin(p: Instance, s: Schedule, q: Queue, d: Dispatching) -> None:
    for slot in range(s.placement.shape[0]):
        s.counts[BUSY, slot] = 0
        s.counts[HELD, slot] = 0
        d.state[_WAITING, slot] = 0
        d.state[_HELD, slot] = 0
        d.state[_TOUCHED, slot] = 0
        d.state[_RUNNING, slot] = NOBODY
        q.slot_s[CARD_OUT, slot] = 0.0
        q.slot_s[CARD_IN, slot] = 0.0
    for slot in range(q.link_free_s.shape[0]):
        for other in range(q.link_free_s.shape[1]):
            q.link_free_s[slot, other] = 0.0
    if p.contention == SHARED_CAPACITY:
        clear(q.sharing)


@called
def _wait(d: Dispatching, slot: int, task: int, now_s: float) -> bool:
    """Let a task wait at its slot from now on; return whether there is room in the row."""
    place = d.state[_WAITING, slot]
    if place == d.waiting.shape[1]:
        return False
    d.waiting[slot, place] = task
    d.arrived_s[slot, place] = now_s
    d.state[_WAITING, slot] = place + 1
    return True


@inlined
def _let_go(s: Schedule, d: Dispatching, slot: int) -> None:
    """A slot has ended its task; behind a backward it holds one microbatch less."""
    task = d.state[_RUNNING, slot]
    d.state[_RUNNING, slot] = NOBODY
    m, index = task >> INDEX_BITS, task & INDEX_MASK
    if index > s.lengths[m] and not only_relays(s, m, index):
        d.state[_HELD, slot] -= 1


@called
def _choose(p: Instance, s: Schedule, d: Dispatching, slot: int, most_begun: int) -> int:
    """Return the place of the most urgent task that waits and may start, or `NOBODY`."""
    room = p.memory[s.placement[slot]]
    held = d.state[_HELD, slot]
    best = NOBODY
    best_kind = 0
    for place in range(d.state[_WAITING, slot]):
        task = d.waiting[slot, place]
        index = task & INDEX_MASK
        length = s.lengths[task >> INDEX_BITS]
        relays = only_relays(s, task >> INDEX_BITS, index)
        if index < length and not relays and held >= (room if index else min(room, most_begun)):
            continue
        kind = 0 if index == length or relays else 1 if index > length else 2
        sooner = best == NOBODY or kind < best_kind
        if not sooner and kind == best_kind:
            earlier_s = d.arrived_s[slot, best] - d.arrived_s[slot, place]
            sooner = earlier_s > 0 or (earlier_s == 0 and task < d.waiting[slot, best])
        if sooner:
            best = place
            best_kind = kind
    return best


@called
def _start(p: Instance, s: Schedule, d: Dispatching, slot: int, place: int, now_s: float, pending: int) -> int:
    """Start a task that waits; return how many events are pending then."""
    task = d.waiting[slot, place]
    last = d.state[_WAITING, slot] - 1
    d.waiting[slot, place] = d.waiting[slot, last]
    d.arrived_s[slot, place] = d.arrived_s[slot, last]
    d.state[_WAITING, slot] = last
    m = task >> INDEX_BITS
    index = task & INDEX_MASK
    end_s = now_s + duration_s(p, s, m, index)
    turn = s.counts[BUSY, slot]
    s.counts[BUSY, slot] = turn + 1
    s.tasks[BUSY, slot, turn] = task
    s.starts[m, index] = now_s
    s.times_s[BUSY_FROM, slot, turn] = now_s
    s.times_s[BUSY_TO, slot, turn] = end_s + p.overhead_s
    d.state[_RUNNING, slot] = task
    if only_relays(s, m, index):
        pass
    elif index < s.lengths[m]:
        d.state[_HELD, slot] += 1
        begin_stay(s.counts, s.tasks, s.times_s, slot, m, now_s)
    elif index > s.lengths[m]:
        end_stay(s.counts, s.tasks, s.times_s, slot, m, end_s)
    push(d.event_s, d.events, pending, end_s + p.overhead_s, slot << _KIND_BITS | _FREE)
    pending += 1
    if index < 2 * s.lengths[m]:
        push(d.event_s, d.events, pending, end_s, task + 1 << _KIND_BITS | _LEAVES)
        pending += 1
    return pending


@called
def _leave(p: Instance, s: Schedule, q: Queue, d: Dispatching, pending: int, task: int, now_s: float) -> int:
    """Let the message for a task set out, or queue; return how many events are pending then."""
    m = task >> INDEX_BITS
    index = task & INDEX_MASK
    source = s.routes[m, hop_of(index - 1, s.lengths[m])]
    slot = s.routes[m, hop_of(index, s.lengths[m])]
    here = s.placement[source]
    there = s.placement[slot]
    if source != slot and p.contention == SHARED_CAPACITY:
        gbit = p.links[OCCUPANCY_S, here, there] * p.links[GBIT_PER_S, here, there]
        if offer(q.sharing, m, task, source, slot, gbit):
            set_out(q.sharing, p.links, m, here, there, now_s)
        return pending
    arrival_s = now_s
    if source != slot:
        if p.contention != NOT_SHARED:
            shares_cards = p.contention == SHARED_CARDS
            occupied_s = p.links[OCCUPANCY_S, here, there]
            arrival_s = occupy_s(q.link_free_s, q.slot_s, source, slot, now_s, occupied_s, shares_cards)
        arrival_s += p.links[TRANSFER_S, here, there]
    push(d.event_s, d.events, pending, arrival_s, task << _KIND_BITS | _ARRIVES)
    return pending + 1


@called
def _arrive_shared(p: Instance, s: Schedule, q: Queue, d: Dispatching, pending: int, now_s: float) -> int:
    """The next of the messages that share capacities has left; return how many events are pending then."""
    task = next_to_end(q.sharing)
    m = task >> INDEX_BITS
    index = task & INDEX_MASK
    source = s.routes[m, hop_of(index - 1, s.lengths[m])]
    slot = s.routes[m, hop_of(index, s.lengths[m])]
    here = s.placement[source]
    there = s.placement[slot]
    stop(q.sharing, m, now_s)
    following = take_off(q.sharing, m, source, slot)
    if following != NOBODY:
        set_out(q.sharing, p.links, following, here, there, now_s)
    push(d.event_s, d.events, pending, now_s + p.links[LATENCY_S, here, there], task << _KIND_BITS | _ARRIVES)
    return pending + 1
