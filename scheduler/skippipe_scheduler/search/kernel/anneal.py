"""Large neighbourhood search under simulated annealing: take a few microbatches out, change them, insert them again.

Destroy and repair is the large neighbourhood search of Shaw ("Using Constraint Programming and Local Search Methods to
Solve Vehicle Routing Problems", 1998); several operators are chosen at random, as in the adaptive one of Ropke and
Pisinger (2006), though their shares stay. A worse schedule is accepted as in simulated annealing (Kirkpatrick, Gelatt
and Vecchi, 1983): with probability exp(-rise / temperature).

Small schedules are copied, so that after each step every task starts as early as its node's order allows. Large ones
are changed in place and put back where a step is refused; large ones whose transfers are shared are dispatched anew.
"""

import math

from skippipe_scheduler.search.kernel.arrays import (
    BACKWARD,
    BEST,
    BUSY,
    CANDIDATE,
    CURRENT,
    HELD,
    ITERATION_S,
    SCORE,
    Cooling,
    Floats,
    Instance,
    Integers,
    Queue,
    Schedule,
    Work,
)
from skippipe_scheduler.search.kernel.constants import (
    CERTAIN_SHARE,
    CHANGE_ROUTES,
    CHANGE_TWICE,
    EXCHANGE_NODES,
    EXCHANGE_RELAYS,
    EXCHANGE_TASKS,
    LONGEST_FIRST,
    NO_LIMIT_S,
    ONLY_EXCHANGE_NODES,
    REROUTE,
    RETIME_EVERY,
    RETURN_TO_BEST,
    SAME_SCORE_S,
    SHORTEST_WAIT,
    WAIT_DOUBLINGS,
)
from skippipe_scheduler.search.kernel.dispatching import Dispatching, dispatch
from skippipe_scheduler.search.kernel.insertion import commit, find, fits_width, remove, restore
from skippipe_scheduler.search.kernel.jit import called, compiled, inlined
from skippipe_scheduler.search.kernel.moves import (
    exchange_relays,
    longest_first,
    may_exchange,
    obeys_rules,
    perturb,
    select_destroyed,
    select_visitors,
    shuffle,
    snapshot,
    undo_visits,
)
from skippipe_scheduler.search.kernel.rerouting import find_rerouted
from skippipe_scheduler.search.kernel.tasks import below, uniform
from skippipe_scheduler.search.kernel.timing import fits_memory, iteration_s, retime, score_s


@compiled
def count_visits(p: Instance, s: Schedule, w: Work) -> None:
    """Count the visits of the stages anew."""
    for stage in range(w.visits.shape[0]):
        w.visits[stage] = 0
    for m in range(s.routes.shape[0]):
        for hop in range(s.lengths[m]):
            w.visits[p.stage_of[s.routes[m, hop]]] += 1


def construct(p: Instance, s: Schedule, w: Work, q: Queue, sequence: Integers, wait_s: float, rerouted: bool) -> bool:
    """Insert the microbatches in `sequence` into an empty schedule and start everything as early as possible.

    If `rerouted`, each goes through the replicas that are fastest then. Returns False where a slot would get more tasks
    than its row holds. Not compiled itself, which would take seconds.
    """
    s.counts[:] = 0
    return insert_sequence(p, s, w, q, sequence, wait_s, rerouted)


@compiled
def insert_sequence(
    p: Instance, s: Schedule, w: Work, q: Queue, sequence: Integers, wait_s: float, rerouted: bool
) -> bool:
    """Insert the microbatches in `sequence` into a schedule that is timed; False where it cannot take them.

    That is where a slot would get more tasks than its row holds or, already before, more than its memory.
    """
    if not fits_memory(p, s):
        return False
    for index in range(sequence.shape[0]):
        if not _insert(p, s, w, sequence[index], wait_s, math.inf, rerouted):
            return False
    count_visits(p, s, w)
    return retime(p, s, q, -1)


@called
def _insert(p: Instance, s: Schedule, w: Work, m: int, wait_s: float, limit_s: float, rerouted: bool) -> bool:
    """Put `m` at the earliest place, as `find` or `find_rerouted` does; False where there is none, or a row is full."""
    if rerouted:
        found = find_rerouted(p, s, w, m, wait_s, limit_s) and fits_width(s, m)
    else:
        found = fits_width(s, m) and find(p, s, w.chain_s, m, wait_s, limit_s)
    if found:
        commit(p, s, w.chain_s, m)
    return found


@compiled
def evaluate(p: Instance, s: Schedule, q: Queue, scores: Floats) -> None:
    """Write the iteration time (mean over the samples where there are any) and the score into a row of scores."""
    samples = p.factors.shape[0]
    total_s = 0.0
    for sample in range(samples):
        retime(p, s, q, sample)
        total_s += iteration_s(p, s, q)
    if samples:
        # The schedule keeps its nominal starts, whatever the last sample made of them.
        retime(p, s, q, -1)
        scores[ITERATION_S] = total_s / samples
    else:
        scores[ITERATION_S] = iteration_s(p, s, q)
    scores[SCORE] = score_s(p, s, q, scores[ITERATION_S])


@compiled
def is_better(scores: Floats) -> bool:
    """Return whether the current schedule is better than the best: shorter or, of equals, with the lower score."""
    gained_s = scores[BEST, ITERATION_S] - scores[CURRENT, ITERATION_S]
    lower = scores[CURRENT, SCORE] < scores[BEST, SCORE] - SAME_SCORE_S
    return gained_s > SAME_SCORE_S or (gained_s > -SAME_SCORE_S and lower)


@inlined
def _set_scores(scores: Floats, row: int, source: int) -> None:
    """Make a row of `scores` equal to another."""
    scores[row, ITERATION_S] = scores[source, ITERATION_S]
    scores[row, SCORE] = scores[source, SCORE]


@compiled
def copy_schedule(target: Schedule, source: Schedule) -> None:
    """Make `target` equal to `source`: of each row only what is in use, which is far less than the whole arrays."""
    # The rows BUSY_FROM and BUSY_TO of `times_s` go with BUSY, the others with HELD.
    for m in range(source.routes.shape[0]):
        target.lengths[m] = source.lengths[m]
        for hop in range(source.lengths[m]):
            target.routes[m, hop] = source.routes[m, hop]
            target.relays[m, hop] = source.relays[m, hop]
        for index in range(2 * source.lengths[m] + 1):
            target.starts[m, index] = source.starts[m, index]
    for slot in range(source.placement.shape[0]):
        target.placement[slot] = source.placement[slot]
        for kind in (BUSY, HELD):
            target.counts[kind, slot] = source.counts[kind, slot]
            for place in range(source.counts[kind, slot]):
                target.tasks[kind, slot, place] = source.tasks[kind, slot, place]
                target.times_s[2 * kind, slot, place] = source.times_s[2 * kind, slot, place]
                target.times_s[2 * kind + 1, slot, place] = source.times_s[2 * kind + 1, slot, place]


@inlined
def _wait_s(p: Instance, w: Work) -> float:
    """Draw the longest wait of a task for its node."""
    total_s = 0.0
    for node in range(p.memory.shape[0]):
        total_s += p.node_s[BACKWARD, node]
    return SHORTEST_WAIT * 2.0 ** below(w.random, WAIT_DOUBLINGS) * total_s / p.memory.shape[0]


@called
def _exchange_nodes(p: Instance, s: Schedule, w: Work, q: Queue) -> int:
    """Two slots exchange their nodes; choose microbatches to insert again, -1 where a pin or memory forbids it."""
    slots = s.placement.shape[0]
    left = below(w.random, slots)
    right = (left + 1 + below(w.random, slots - 1)) % slots
    if not may_exchange(p, s, left, right):
        return -1
    node = s.placement[left]
    s.placement[left] = s.placement[right]
    s.placement[right] = node
    retime(p, s, q, -1)
    if not fits_memory(p, s):
        return -1
    if uniform(w.random) < ONLY_EXCHANGE_NODES:
        return 0
    return select_visitors(s, w, left, right)


@called
def _destroy_and_repair(p: Instance, s: Schedule, w: Work, count: int, routes: bool, limit_s: float) -> bool:
    """Take the chosen out, perhaps change their routes (if `routes`), insert them again.

    Returns False where a rule forbids it, or one would end after `limit_s`. Then the chosen are out and their routes
    are whatever they are; `w.visits` is as before.
    """
    snapshot(s, w, count)
    for index in range(count):
        remove(s, w.chosen[index])
    if count and routes and uniform(w.random) < CHANGE_ROUTES:
        perturb(p, s, w, count)
        if uniform(w.random) < CHANGE_TWICE:
            perturb(p, s, w, count)
    if not obeys_rules(p, s, w, count):
        return False
    shuffle(w, count)
    if uniform(w.random) < LONGEST_FIRST:
        longest_first(p, s, w, count)
    wait_s = _wait_s(p, w)
    rerouted = routes and uniform(w.random) < REROUTE
    for index in range(count):
        if not _insert(p, s, w, w.chosen[index], wait_s, limit_s, rerouted):
            # None of the chosen stays in, not even those that were placed before this one.
            for before in range(index):
                remove(s, w.chosen[before])
            undo_visits(p, s, w, count)
            return False
    return True


@called
def _propose(p: Instance, s: Schedule, w: Work, q: Queue, free_placement: bool, relays: bool) -> int:
    """Make one random change; return how many microbatches were inserted again, -1 where a rule forbids it."""
    if relays and uniform(w.random) < EXCHANGE_RELAYS:
        exchange_relays(s, w)
        return 0 if fits_memory(p, s) else -1
    if uniform(w.random) < EXCHANGE_TASKS:
        return 0 if _exchange_tasks(s, w) and fits_memory(p, s) else -1
    exchange = free_placement and uniform(w.random) < EXCHANGE_NODES
    count = _exchange_nodes(p, s, w, q) if exchange else select_destroyed(s, w)
    if count < 0 or not _destroy_and_repair(p, s, w, count, not exchange, NO_LIMIT_S):
        return -1
    return count


@called
def _exchange_tasks(s: Schedule, w: Work) -> bool:
    """Exchange two neighbouring tasks of a slot: whole microbatches inserted early never make one wait on purpose."""
    slot = below(w.random, s.placement.shape[0])
    if s.counts[BUSY, slot] < 2:
        return False
    place = below(w.random, s.counts[BUSY, slot] - 1)
    task = s.tasks[BUSY, slot, place]
    s.tasks[BUSY, slot, place] = s.tasks[BUSY, slot, place + 1]
    s.tasks[BUSY, slot, place + 1] = task
    return True


@inlined
def _acceptable(w: Work, current: float, temperature_s: float) -> float:
    """Draw the highest score that is accepted: Metropolis' rule, solved for the score."""
    return current - temperature_s * math.log(uniform(w.random))


@called
def _accept(current: Schedule, candidate: Schedule, best: Schedule, scores: Floats) -> None:
    """Go on from the candidate, and keep it where it is the best so far."""
    copy_schedule(current, candidate)
    _set_scores(scores, CURRENT, CANDIDATE)
    if is_better(scores):
        copy_schedule(best, current)
        _set_scores(scores, BEST, CURRENT)


@inlined
def _temperature_s(cooling: Cooling, step: int) -> float:
    """Return the temperature of a step; it falls by as much at each."""
    return cooling.from_s + (cooling.to_s - cooling.from_s) * step / cooling.steps


@compiled
def anneal(
    p: Instance,
    current: Schedule,
    candidate: Schedule,
    best: Schedule,
    w: Work,
    q: Queue,
    scores: Floats,
    cooling: Cooling,
    free_placement: bool,
) -> int:
    """Search from `current`, keep the best in `best`; return the steps made, fewer where the goal is reached.

    `scores` (3, 2) holds iteration seconds and score of current, candidate and best.
    """
    for step in range(cooling.steps):
        if scores[BEST, ITERATION_S] <= cooling.goal_s:
            return step
        copy_schedule(candidate, current)
        count = _propose(p, candidate, w, q, free_placement, cooling.relays)
        # Exchanged tasks may deadlock; whole microbatches inserted never do.
        if count < 0 or not retime(p, candidate, q, -1):
            continue
        evaluate(p, candidate, q, scores[CANDIDATE])
        if scores[CANDIDATE, SCORE] <= _acceptable(w, scores[CURRENT, SCORE], _temperature_s(cooling, step)):
            _accept(current, candidate, best, scores)
        else:
            undo_visits(p, candidate, w, count)
            if step % RETURN_TO_BEST == 0:
                copy_schedule(current, best)
                count_visits(p, current, w)
                _set_scores(scores, CURRENT, BEST)
    return cooling.steps


@compiled
def anneal_in_place(
    p: Instance, current: Schedule, best: Schedule, w: Work, q: Queue, scores: Floats, cooling: Cooling
) -> int:
    """Search like `anneal`, for schedules too large to copy at every step; the placement stays.

    Tasks that are not taken out keep their starts, so that a step takes time only for what it touches; from time to
    time all start as early as possible again, and only then a better schedule is recognised.
    """
    for step in range(cooling.steps):
        if scores[BEST, ITERATION_S] <= cooling.goal_s:
            return step
        most = _acceptable(w, scores[CURRENT, SCORE], _temperature_s(cooling, step))
        # What comes on top of the iteration time hardly changes in one step: who ends this late would be refused.
        limit_s = most - CERTAIN_SHARE * (scores[CURRENT, SCORE] - scores[CURRENT, ITERATION_S])
        count = select_destroyed(current, w)
        changed = _destroy_and_repair(p, current, w, count, True, limit_s)
        if changed:
            evaluate(p, current, q, scores[CANDIDATE])
        if changed and scores[CANDIDATE, SCORE] <= most:
            _set_scores(scores, CURRENT, CANDIDATE)
        else:
            # Back to where it was: the chosen come out again if they went in, and return to their old places.
            if changed:
                undo_visits(p, current, w, count)
                for index in range(count):
                    remove(current, w.chosen[index])
            for index in range(count):
                restore(p, current, w, w.chosen[index], index)
        if step % RETIME_EVERY == RETIME_EVERY - 1 or step == cooling.steps - 1:
            retime(p, current, q, -1)
            evaluate(p, current, q, scores[CURRENT])
            if is_better(scores):
                copy_schedule(best, current)
                _set_scores(scores, BEST, CURRENT)
    return cooling.steps


@compiled
def anneal_dispatched(
    p: Instance,
    current: Schedule,
    candidate: Schedule,
    best: Schedule,
    w: Work,
    q: Queue,
    d: Dispatching,
    scores: Floats,
    cooling: Cooling,
    most_begun: int,
) -> int:
    """Search like `anneal` over routes alone, for schedules whose transfers are too many to insert among the others.

    The order is that of a dispatch (with `most_begun`), so that each step takes the time of all tasks; the placement
    stays. Where only relays are exchanged, so does the order.
    """
    for step in range(cooling.steps):
        if scores[BEST, ITERATION_S] <= cooling.goal_s:
            return step
        copy_schedule(candidate, current)
        count = 0
        if cooling.relays and uniform(w.random) < EXCHANGE_RELAYS:
            exchange_relays(candidate, w)
            changed = fits_memory(p, candidate) and retime(p, candidate, q, -1)
        else:
            count = select_destroyed(candidate, w)
            snapshot(candidate, w, count)
            perturb(p, candidate, w, count)
            if uniform(w.random) < CHANGE_TWICE:
                perturb(p, candidate, w, count)
            if not obeys_rules(p, candidate, w, count):
                continue
            changed = dispatch(p, candidate, q, d, most_begun)
        if changed:
            evaluate(p, candidate, q, scores[CANDIDATE])
        if changed and scores[CANDIDATE, SCORE] <= _acceptable(
            w, scores[CURRENT, SCORE], _temperature_s(cooling, step)
        ):
            _accept(current, candidate, best, scores)
        else:
            undo_visits(p, candidate, w, count)
    return cooling.steps
