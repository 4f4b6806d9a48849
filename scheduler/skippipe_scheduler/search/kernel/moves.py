"""The destroy operators of the large neighbourhood search, and small moves on the routes of what they chose.

As in Shaw's relatedness (1998) and the operators of Ropke and Pisinger (2006), what is taken out together has something
in common: it ends late, has one origin, or shares a slot. A move may break a rule; `obeys_rules` tells.
"""

from skippipe_scheduler.search.kernel.arrays import HELD, LEAST, LENGTH, MOST, Instance, Schedule, Work
from skippipe_scheduler.search.kernel.constants import (
    FOREIGN_VISIT,
    LATE,
    OF_ONE_ORIGIN,
    SHARING_A_SLOT,
    SPARE_LATE,
    USUAL,
    USUAL_SELECTION,
    USUAL_VISITORS,
)
from skippipe_scheduler.search.kernel.jit import called, inlined
from skippipe_scheduler.search.kernel.tasks import below, round_trip_s, uniform


@called
def select_destroyed(s: Schedule, w: Work) -> int:
    """Choose some microbatches: late ones, of one origin, that share a slot, or any; return how many."""
    microbatches = s.routes.shape[0]
    most = USUAL_SELECTION if uniform(w.random) < USUAL else w.chosen.shape[0] - 2
    count = 2 + below(w.random, most - 1) if microbatches > most else 1 + below(w.random, microbatches)
    way = uniform(w.random)
    size = 0
    if way < LATE:
        return _draw_late(s, w, count)
    if way < OF_ONE_ORIGIN:
        origin = s.routes[below(w.random, microbatches), 0]
        for m in range(microbatches):
            if s.routes[m, 0] == origin:
                w.pool[size] = m
                size += 1
    elif way < SHARING_A_SLOT:
        # A slot that a random microbatch visits: busy slots are chosen more often.
        m = below(w.random, microbatches)
        slot = s.routes[m, below(w.random, s.lengths[m])]
        for index in range(s.counts[HELD, slot]):
            w.pool[index] = s.tasks[HELD, slot, index]
        size = s.counts[HELD, slot]
    else:
        return _draw_any(w, 0, count, microbatches)
    return _draw_from_pool(w, 0, min(count, size), size)


@called
def _draw_from_pool(w: Work, chosen: int, count: int, size: int) -> int:
    """Draw `count` of the first `size` in the pool (Fisher and Yates' shuffle); return how many are chosen now."""
    for index in range(count):
        other = index + below(w.random, size - index)
        m = w.pool[other]
        w.pool[other] = w.pool[index]
        w.chosen[chosen + index] = m
    return chosen + count


@called
def _draw_any(w: Work, chosen: int, count: int, microbatches: int) -> int:
    """Draw from all microbatches until `count` are chosen."""
    while chosen < count:
        m = below(w.random, microbatches)
        new = True
        for index in range(chosen):
            if w.chosen[index] == m:
                new = False
        if new:
            w.chosen[chosen] = m
            chosen += 1
    return chosen


@called
def _draw_late(s: Schedule, w: Work, count: int) -> int:
    """Choose half of them among the latest to finish, the others among all."""
    # The latest go into the pool, latest first: an insertion sort that keeps no more than it needs.
    latest = min(s.routes.shape[0], count + SPARE_LATE)
    size = 0
    for m in range(s.routes.shape[0]):
        end_s = s.starts[m, 2 * s.lengths[m]]
        place = size
        while place > 0:
            other = w.pool[place - 1]
            if s.starts[other, 2 * s.lengths[other]] >= end_s:
                break
            if place < latest:
                w.pool[place] = other
            place -= 1
        if place < latest:
            w.pool[place] = m
            size = min(size + 1, latest)
    chosen = _draw_from_pool(w, 0, min((count + 1) // 2, size), size)
    return _draw_any(w, chosen, count, s.routes.shape[0])


@inlined
def may_exchange(p: Instance, s: Schedule, left: int, right: int) -> bool:
    """Return whether the nodes of two slots may change places: neither is pinned to a stage that it would leave."""
    leaves = p.pinned[s.placement[left]]
    comes = p.pinned[s.placement[right]]
    return (leaves < 0 or leaves == p.stage_of[right]) and (comes < 0 or comes == p.stage_of[left])


@called
def snapshot(s: Schedule, w: Work, count: int) -> None:
    """Remember the chosen microbatches as they are."""
    for index in range(count):
        m = w.chosen[index]
        w.saved[index, LENGTH] = s.lengths[m]
        for hop in range(s.lengths[m]):
            w.saved[index, hop] = s.routes[m, hop]
        for task in range(2 * s.lengths[m] + 1):
            w.saved_s[index, task] = s.starts[m, task]


@called
def perturb(p: Instance, s: Schedule, w: Work, count: int) -> None:
    """Apply one random move to the chosen microbatches, which are not in the schedule now."""
    # One microbatch twice is allowed: moves of two then change nothing, or stand for a move of one.
    first = w.chosen[below(w.random, count)]
    second = w.chosen[below(w.random, count)]
    kind = below(w.random, 8 if p.free_origins else 7)
    hop = 1 + below(w.random, s.lengths[first] - 1)
    if kind <= 1:
        _exchange_replicas(p, s, first, second, hop)
    elif kind == 2:  # any replica of the same stage
        stage = p.stage_of[s.routes[first, hop]]
        s.routes[first, hop] = p.first_slot[stage] + below(w.random, p.first_slot[stage + 1] - p.first_slot[stage])
    elif kind == 3:
        _exchange_tails(s, first, second)
    elif kind == 4:
        _exchange_stages(p, s, w, first, second, hop)
    elif kind == 5:
        _arrange(p, s, w, first)
    elif kind == 6:
        _copy_sibling(p, s, w, first)
    else:  # another origin; only where their numbers are free
        s.routes[first, 0] = below(w.random, p.first_slot[1])


@inlined
def _hop_at(p: Instance, s: Schedule, m: int, stage: int) -> int:
    """Return the hop of `m` at a stage, -1 where it does not visit it."""
    for hop in range(1, s.lengths[m]):
        if p.stage_of[s.routes[m, hop]] == stage:
            return hop
    return -1


@called
def exchange_relays(s: Schedule, w: Work) -> None:
    """Let each of two microbatches leave out what the other did: stages stay visited as often as before."""
    first = below(w.random, s.routes.shape[0])
    second = below(w.random, s.routes.shape[0])
    for hop in range(s.lengths[first]):
        relays = s.relays[first, hop]
        s.relays[first, hop] = s.relays[second, hop]
        s.relays[second, hop] = relays


@called
def _exchange_replicas(p: Instance, s: Schedule, first: int, second: int, hop: int) -> None:
    """Two microbatches exchange the replicas they use of a stage that both visit."""
    other = _hop_at(p, s, second, p.stage_of[s.routes[first, hop]])
    if other > 0:
        slot = s.routes[first, hop]
        s.routes[first, hop] = s.routes[second, other]
        s.routes[second, other] = slot


@called
def _exchange_tails(s: Schedule, first: int, second: int) -> None:
    """Two microbatches exchange all but their origins."""
    for hop in range(1, max(s.lengths[first], s.lengths[second])):
        slot = s.routes[first, hop]
        s.routes[first, hop] = s.routes[second, hop]
        s.routes[second, hop] = slot
    length = s.lengths[first]
    s.lengths[first] = s.lengths[second]
    s.lengths[second] = length


@called
def _exchange_stages(p: Instance, s: Schedule, w: Work, first: int, second: int, hop: int) -> None:
    """A microbatch gives a stage visit for one of another's, or, where coverage may allow it, for any slot.

    Nothing changes where a route would visit a stage twice.
    """
    gives = s.routes[first, hop]
    if first == second or uniform(w.random) < FOREIGN_VISIT:
        slots = p.stage_of.shape[0]
        takes = p.first_slot[1] + below(w.random, slots - p.first_slot[1])
        if _hop_at(p, s, first, p.stage_of[takes]) < 0:
            s.routes[first, hop] = takes
            _arrange(p, s, w, first)
        return
    other = 1 + below(w.random, s.lengths[second] - 1)
    takes = s.routes[second, other]
    if _hop_at(p, s, first, p.stage_of[takes]) < 0 and _hop_at(p, s, second, p.stage_of[gives]) < 0:
        s.routes[first, hop] = takes
        s.routes[second, other] = gives
        _arrange(p, s, w, first)
        _arrange(p, s, w, second)


@called
def _arrange(p: Instance, s: Schedule, w: Work, m: int) -> None:
    """Order the hops of `m` by stage, then make a random number of swaps."""
    # Slots are numbered stage by stage, so sorting slots (by insertion, routes are short) sorts stages.
    length = s.lengths[m]
    for hop in range(2, length):
        slot = s.routes[m, hop]
        place = hop
        while place > 1 and s.routes[m, place - 1] > slot:
            s.routes[m, place] = s.routes[m, place - 1]
            place -= 1
        s.routes[m, place] = slot
    if length > 2:
        for _ in range(below(w.random, p.max_swaps + 1)):
            hop = 1 + below(w.random, length - 2)
            slot, following = s.routes[m, hop], s.routes[m, hop + 1]
            if p.stage_of[following] - p.stage_of[slot] <= p.max_swap_distance:
                s.routes[m, hop] = following
                s.routes[m, hop + 1] = slot


@called
def _copy_sibling(p: Instance, s: Schedule, w: Work, m: int) -> None:
    """A microbatch uses the replicas that another of the same origin uses, stage by stage."""
    # The first sibling from a random microbatch on, round the end.
    microbatches = s.routes.shape[0]
    start = below(w.random, microbatches)
    for step in range(microbatches):
        sibling = (start + step) % microbatches
        if sibling != m and s.routes[sibling, 0] == s.routes[m, 0]:
            for hop in range(1, s.lengths[m]):
                other = _hop_at(p, s, sibling, p.stage_of[s.routes[m, hop]])
                if other > 0:
                    s.routes[m, hop] = s.routes[sibling, other]
            return


@called
def obeys_rules(p: Instance, s: Schedule, w: Work, count: int) -> bool:
    """Return whether the chosen microbatches' routes are legal and cover the stages, in place of those saved.

    If so, `w.visits` counts them; `undo_visits` takes that back. Else it is as before.
    """
    for index in range(count):
        if not _legal(p, s, w.chosen[index]):
            return False
    _add_visits(p, s, w, count, 1)
    fine = True
    for stage in range(1, w.visits.shape[0]):
        if w.visits[stage] < p.visits[LEAST, stage] or w.visits[stage] > p.visits[MOST, stage]:
            fine = False
    if not fine:
        _add_visits(p, s, w, count, -1)
    return fine


@called
def _add_visits(p: Instance, s: Schedule, w: Work, count: int, sign: int) -> None:
    """Count the chosen on their routes instead of on those saved (with sign -1 the other way round)."""
    for index in range(count):
        m = w.chosen[index]
        for hop in range(s.lengths[m]):
            w.visits[p.stage_of[s.routes[m, hop]]] += sign
        for hop in range(w.saved[index, LENGTH]):
            w.visits[p.stage_of[w.saved[index, hop]]] -= sign


@called
def undo_visits(p: Instance, s: Schedule, w: Work, count: int) -> None:
    """Take back the visits that `obeys_rules` counted."""
    _add_visits(p, s, w, count, -1)


@called
def _legal(p: Instance, s: Schedule, m: int) -> bool:
    """Return whether a route obeys the rules on swaps and jumps; the same as `problem.rules.first_offence`."""
    swaps = 0
    frontier = 0
    for hop in range(1, s.lengths[m]):
        stage = p.stage_of[s.routes[m, hop]]
        if stage > frontier + p.max_forward_jump:
            return False
        if frontier - stage > p.max_swap_distance:
            return False
        swaps += stage < frontier
        frontier = max(frontier, stage)
    return swaps <= p.max_swaps


@called
def shuffle(w: Work, count: int) -> None:
    """Put the chosen microbatches, with what is saved of them, into a random sequence (Fisher and Yates)."""
    for index in range(count - 1):
        other = index + below(w.random, count - index)
        _exchange_saved(w, index, other)


@called
def longest_first(p: Instance, s: Schedule, w: Work, count: int) -> None:
    """Put the chosen microbatches, with what is saved of them, into the sequence of their round trips, by insertion."""
    for index in range(1, count):
        place = index
        while place > 0 and round_trip_s(p, s, w.chosen[place]) > round_trip_s(p, s, w.chosen[place - 1]):
            _exchange_saved(w, place, place - 1)
            place -= 1


@called
def _exchange_saved(w: Work, index: int, other: int) -> None:
    """Exchange two of the chosen, with what is saved of them."""
    m = w.chosen[index]
    w.chosen[index] = w.chosen[other]
    w.chosen[other] = m
    for hop in range(w.saved.shape[1]):
        slot = w.saved[index, hop]
        w.saved[index, hop] = w.saved[other, hop]
        w.saved[other, hop] = slot
    for task in range(w.saved_s.shape[1]):
        start_s = w.saved_s[index, task]
        w.saved_s[index, task] = w.saved_s[other, task]
        w.saved_s[other, task] = start_s


@called
def select_visitors(s: Schedule, w: Work, left: int, right: int) -> int:
    """Choose 2 to `USUAL_VISITORS` of the microbatches that visit one of two slots; return how many."""
    size = 0
    for slot in (left, right):
        for index in range(s.counts[HELD, slot]):
            m = s.tasks[HELD, slot, index]
            new = True
            for other in range(size):
                if w.pool[other] == m:
                    new = False
            if new:
                w.pool[size] = m
                size += 1
    return _draw_from_pool(w, 0, min(size, 2 + below(w.random, USUAL_VISITORS - 1)), size)
