"""Exact times of a schedule whose nodes run their tasks in a given order, and its score.

The order of the nodes and the chains of the microbatches are the arcs of a disjunctive graph (Roy and Sussmann, 1964);
the times are its longest paths, found by visiting each task when all before it are done. Where links are shared, the
transfers are events that a binary heap hands out in order of time, as in the simulator (`plan.simulate`).
"""

from skippipe_scheduler.search.kernel.arrays import (
    BACKWARD,
    BUSY,
    BUSY_FROM,
    BUSY_TO,
    CARD_IN,
    CARD_OUT,
    COUNT,
    FORWARD,
    FREE,
    GBIT_PER_S,
    HELD,
    HELD_FROM,
    HELD_TO,
    INDEX_BITS,
    INDEX_MASK,
    LAST_END,
    LATENCY_S,
    LOSS,
    NOBODY,
    NOT_SHARED,
    OCCUPANCY_S,
    SHARED_CAPACITY,
    SHARED_CARDS,
    TRANSFER_S,
    WEIGHT,
    Floats,
    Instance,
    Integers,
    Queue,
    Schedule,
)
from skippipe_scheduler.search.kernel.constants import MEAN_WEIGHT, ORIGIN_WEIGHT
from skippipe_scheduler.search.kernel.fair_sharing import clear, next_end_s, next_to_end, offer, set_out, stop, take_off
from skippipe_scheduler.search.kernel.jit import called, compiled, inlined
from skippipe_scheduler.search.kernel.reduction_time import reduction_s
from skippipe_scheduler.search.kernel.tasks import duration_s, hop_of, only_relays

_TRANSFERS = 1000003
"""Added to the number of a task it gives the number of the transfer before it, for random factors."""


@compiled
def retime(p: Instance, s: Schedule, q: Queue, sample: int) -> bool:
    """Start every task as early as the order of its node allows; transfers queue where links are shared.

    `sample` takes that row of random factors for all tasks and transfers, -1 the nominal times. Returns False where
    not every task can run: the order deadlocks, or microbatches are missing.
    """
    if p.contention == SHARED_CAPACITY:
        return _retime_shared(p, s, q, sample)
    # Handing on the tuples of arrays costs more than a task does, so the loop below calls nothing that takes them.
    _reset(s, q)
    links, factors = p.links, p.factors
    placement, routes, lengths = s.placement, s.routes, s.lengths
    ready_s, following, slot_s = q.ready_s, q.following, q.slot_s
    pending_s, pending, link_free_s = q.pending_s, q.pending, q.link_free_s
    shares_links, shares_cards = p.contention != NOT_SHARED, p.contention == SHARED_CARDS
    waiting = 0
    origin = 0
    # First every origin starts what it can; then the transfers arrive one by one, and each may let its slot go on. The
    # order of arrivals changes no time where links are not shared: then the pending transfers are a stack, else a heap.
    while origin < p.first_slot[1] or waiting:
        if origin < p.first_slot[1]:
            slot = origin
            origin += 1
        else:
            task = take_next(pending_s, pending, waiting) if shares_links else pending[waiting - 1]
            waiting -= 1
            m = task >> INDEX_BITS
            index = task & INDEX_MASK
            slot = routes[m, hop_of(index, lengths[m])]
            source = routes[m, hop_of(index - 1, lengths[m])]
            # `take_next` has left the time of the transfer where it took the last entry away.
            arrival_s = pending_s[waiting]
            if source != slot:
                here = placement[source]
                there = placement[slot]
                longer = factor(factors, sample, task + _TRANSFERS)
                if shares_links:
                    occupied_s = links[OCCUPANCY_S, here, there] * longer
                    arrival_s = occupy_s(link_free_s, slot_s, source, slot, arrival_s, occupied_s, shares_cards)
                arrival_s += links[TRANSFER_S, here, there] * longer
            ready_s[m] = arrival_s
            following[m] = index
        waiting = run_tasks(p, s, q, sample, slot, shares_links, waiting)
    return has_run_all(s, q)


@called
def _retime_shared(p: Instance, s: Schedule, q: Queue, sample: int) -> bool:
    """Do the same where transfers share capacities: what comes next is that one gets ready, or that one has left."""
    _reset(s, q)
    clear(q.sharing)
    waiting = 0
    for origin in range(p.first_slot[1]):
        waiting = run_tasks(p, s, q, sample, origin, True, waiting)
    while waiting or q.sharing.state[COUNT]:
        gets_ready = waiting > 0 and q.pending_s[0] <= next_end_s(q.sharing)
        if gets_ready:
            task = take_next(q.pending_s, q.pending, waiting)
            waiting -= 1
            now_s = q.pending_s[waiting]
        else:
            now_s = next_end_s(q.sharing)
            task = next_to_end(q.sharing)
        m = task >> INDEX_BITS
        index = task & INDEX_MASK
        source = s.routes[m, hop_of(index - 1, s.lengths[m])]
        slot = s.routes[m, hop_of(index, s.lengths[m])]
        here = s.placement[source]
        there = s.placement[slot]
        longer = factor(p.factors, sample, task + _TRANSFERS)
        if gets_ready and source != slot:
            gbit = p.links[OCCUPANCY_S, here, there] * p.links[GBIT_PER_S, here, there] * longer
            if offer(q.sharing, m, task, source, slot, gbit):
                set_out(q.sharing, p.links, m, here, there, now_s)
            continue
        if not gets_ready:
            stop(q.sharing, m, now_s)
            following = take_off(q.sharing, m, source, slot)
            if following != NOBODY:
                set_out(q.sharing, p.links, following, here, there, now_s)
            now_s += p.links[LATENCY_S, here, there] * longer
        q.ready_s[m] = now_s
        q.following[m] = index
        waiting = run_tasks(p, s, q, sample, slot, True, waiting)
    return has_run_all(s, q)


@inlined
def run_tasks(p: Instance, s: Schedule, q: Queue, sample: int, slot: int, by_time: bool, waiting: int) -> int:
    """Run a slot's tasks in order as long as the input of the next one is there; return how many transfers then wait.

    Their outputs go to the heap of those that wait if `by_time`, else to a stack.
    """
    place = q.position[slot]
    while place < s.counts[BUSY, slot]:
        task = s.tasks[BUSY, slot, place]
        m = task >> INDEX_BITS
        index = task & INDEX_MASK
        if q.following[m] != index:
            break
        length = s.lengths[m]
        kind = FORWARD if index < length else LOSS if index == length else BACKWARD
        taken_s = p.node_s[kind, s.placement[slot]] * factor(p.factors, sample, task)
        if kind != LOSS:
            taken_s *= p.stages[WEIGHT, p.stage_of[slot]]
        relays = only_relays(s, m, index)
        if relays:
            taken_s = 0.0
        start_s = max(q.ready_s[m], q.slot_s[FREE, slot])
        end_s = start_s + taken_s
        s.starts[m, index] = start_s
        s.times_s[BUSY_FROM, slot, place] = start_s
        s.times_s[BUSY_TO, slot, place] = end_s + p.overhead_s
        q.slot_s[FREE, slot] = end_s + p.overhead_s
        place += 1
        if relays:
            pass
        elif kind == FORWARD:
            begin_stay(s.counts, s.tasks, s.times_s, slot, m, start_s)
        elif kind == BACKWARD:
            end_stay(s.counts, s.tasks, s.times_s, slot, m, end_s)
        # The output leaves for the next task of the microbatch, which cannot run before it has arrived.
        q.following[m] = -1
        if index < 2 * length:
            if by_time:
                push(q.pending_s, q.pending, waiting, end_s, task + 1)
            else:
                q.pending_s[waiting] = end_s
                q.pending[waiting] = task + 1
            waiting += 1
    q.position[slot] = place
    return waiting


@inlined
def has_run_all(s: Schedule, q: Queue) -> bool:
    """Return whether all slots have run all their tasks."""
    complete = True
    for slot in range(s.placement.shape[0]):
        complete &= q.position[slot] == s.counts[BUSY, slot]
    return complete


@inlined
def occupy_s(
    link_free_s: Floats, slot_s: Floats, source: int, slot: int, ready_s: float, occupied_s: float, shares_cards: bool
) -> float:
    """Return when a transfer starts that is ready then, and keep its link (and both cards) busy for `occupied_s`."""
    start_s = max(ready_s, link_free_s[source, slot])
    if shares_cards:
        start_s = max(start_s, slot_s[CARD_OUT, source], slot_s[CARD_IN, slot])
    until_s = start_s + occupied_s
    link_free_s[source, slot] = until_s
    slot_s[CARD_OUT, source] = until_s
    slot_s[CARD_IN, slot] = until_s
    return start_s


@inlined
def begin_stay(counts: Integers, tasks: Integers, times_s: Floats, slot: int, m: int, start_s: float) -> None:
    """The slot holds `m` from the start of its forward on."""
    held = counts[HELD, slot]
    tasks[HELD, slot, held] = m
    times_s[HELD_FROM, slot, held] = start_s
    counts[HELD, slot] = held + 1


@inlined
def end_stay(counts: Integers, tasks: Integers, times_s: Floats, slot: int, m: int, end_s: float) -> None:
    """The slot lets go of `m` at the end of its backward; of those it has held, `m` came late, so from the back."""
    held = counts[HELD, slot] - 1
    while tasks[HELD, slot, held] != m:
        held -= 1
    times_s[HELD_TO, slot, held] = end_s


@inlined
def _reset(s: Schedule, q: Queue) -> None:
    """Clear what timing writes: every microbatch is ready at its origin."""
    for slot in range(s.placement.shape[0]):
        s.counts[HELD, slot] = 0
        q.position[slot] = 0
        q.slot_s[FREE, slot] = 0.0
        q.slot_s[CARD_OUT, slot] = 0.0
        q.slot_s[CARD_IN, slot] = 0.0
    for slot in range(q.link_free_s.shape[0]):
        for other in range(q.link_free_s.shape[1]):
            q.link_free_s[slot, other] = 0.0
    for m in range(s.routes.shape[0]):
        q.following[m] = 0
        q.ready_s[m] = 0.0


@inlined
def factor(factors: Floats, sample: int, number: int) -> float:
    """Return the random factor of a task or transfer in a sample; hashing its number makes neighbours differ."""
    if sample < 0:
        return 1.0
    return factors[sample, number * 7919 % factors.shape[1]]


@inlined
def push(pending_s: Floats, pending: Integers, count: int, ready_s: float, task: int) -> None:
    """Add a transfer to the binary heap of `count`: earliest first, of equals the lower task."""
    # Sift up: parents that come later move down, until the place is found.
    place = count
    while place > 0:
        parent = (place - 1) // 2
        if pending_s[parent] < ready_s or (pending_s[parent] == ready_s and pending[parent] < task):
            break
        pending_s[place] = pending_s[parent]
        pending[place] = pending[parent]
        place = parent
    pending_s[place] = ready_s
    pending[place] = task


@inlined
def take_next(pending_s: Floats, pending: Integers, count: int) -> int:
    """Take the earliest transfer out of the heap of `count`; it is left in the last place."""
    # Sift down: the last entry goes to the root, and the earlier child moves up as long as it comes before it.
    last = count - 1
    task = pending[0]
    ready_s = pending_s[0]
    moved = pending[last]
    moved_s = pending_s[last]
    place = 0
    while 2 * place + 1 < last:
        child = 2 * place + 1
        if child + 1 < last and (
            pending_s[child + 1] < pending_s[child]
            or (pending_s[child + 1] == pending_s[child] and pending[child + 1] < pending[child])
        ):
            child += 1
        if pending_s[child] > moved_s or (pending_s[child] == moved_s and pending[child] > moved):
            break
        pending_s[place] = pending_s[child]
        pending[place] = pending[child]
        place = child
    pending_s[place] = moved_s
    pending[place] = moved
    pending_s[last] = ready_s
    pending[last] = task
    return task


@called
def iteration_s(p: Instance, s: Schedule, q: Queue) -> float:
    """Return the end of the last task or gradient reduction."""
    slots = s.placement.shape[0]
    longest_s = 0.0
    # The last task of a row ends last; the overhead after it holds nobody up.
    for slot in range(slots):
        end_s = 0.0
        if s.counts[BUSY, slot]:
            end_s = s.times_s[BUSY_TO, slot, s.counts[BUSY, slot] - 1] - p.overhead_s
        q.slot_s[LAST_END, slot] = end_s
        longest_s = max(longest_s, end_s)
    for stage in range(p.stages.shape[1]):
        reduced_s = reduction_s(p, s, q.sharing, stage)
        if reduced_s > 0:
            # A reduction begins when the last replica of its stage is done.
            for slot in range(p.first_slot[stage], p.first_slot[stage + 1]):
                longest_s = max(longest_s, q.slot_s[LAST_END, slot] + reduced_s)
    return longest_s


@called
def score_s(p: Instance, s: Schedule, q: Queue, longest_s: float) -> float:
    """Return the iteration time plus small weights on the origins' last finish and the mean finish.

    The iteration time alone is a plateau: most changes do not touch the longest chain.
    """
    # `LAST_END` of the origins is used anew: here it is the end of their last microbatch.
    total_s = 0.0
    origins = p.first_slot[1]
    for origin in range(origins):
        q.slot_s[LAST_END, origin] = 0.0
    for m in range(s.routes.shape[0]):
        last = 2 * s.lengths[m]
        end_s = s.starts[m, last] + duration_s(p, s, m, last)
        total_s += end_s
        origin = s.routes[m, 0]
        q.slot_s[LAST_END, origin] = max(q.slot_s[LAST_END, origin], end_s)
    origins_s = 0.0
    busy = 0
    for origin in range(origins):
        origins_s += q.slot_s[LAST_END, origin]
        busy += q.slot_s[LAST_END, origin] > 0
    return longest_s + ORIGIN_WEIGHT * origins_s / busy + MEAN_WEIGHT * total_s / s.routes.shape[0]


@called
def fits_memory(p: Instance, s: Schedule) -> bool:
    """Return whether no node ever holds more microbatches than its memory, by the order of its tasks."""
    for slot in range(s.placement.shape[0]):
        memory = p.memory[s.placement[slot]]
        held = 0
        for place in range(s.counts[BUSY, slot]):
            task = s.tasks[BUSY, slot, place]
            index = task & INDEX_MASK
            length = s.lengths[task >> INDEX_BITS]
            if only_relays(s, task >> INDEX_BITS, index):
                continue
            if index < length:
                held += 1
                if held > memory:
                    return False
            elif index > length:
                held -= 1
    return True
