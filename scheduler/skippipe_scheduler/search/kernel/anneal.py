"""Large neighbourhood search with annealing: take a few microbatches out, change them, insert them again.

Small schedules are copied, so that after each step every task starts as early as its node's order allows. Large ones
are changed in place and put back where a step is refused.
"""

import math

from skippipe_scheduler.search.kernel.arrays import BACKWARD, BUSY, HELD, Floats, Instance, Integers, Schedule, Work
from skippipe_scheduler.search.kernel.insertion import fits_width, insert, remove, restore
from skippipe_scheduler.search.kernel.jit import called, compiled, inlined
from skippipe_scheduler.search.kernel.moves import (
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
from skippipe_scheduler.search.kernel.tasks import below, uniform
from skippipe_scheduler.search.kernel.timing import fits_memory, iteration_s, retime, score_s

_EXCHANGE_NODES = 0.3
_ONLY_EXCHANGE = 0.3
_EXCHANGE_TASKS = 0.06
_CHANGE_ROUTES = 0.62
_CHANGE_TWICE = 0.3
_LONGEST_FIRST = 0.4
_RETURN_TO_BEST = 400
_RETIME_EVERY = 300
_MARGIN = 0.95
_EPSILON_S = 1e-11
_NO_LIMIT_S = 1e300
_WAITS = 5
"""Longest waits of a task for its node: 0.5, 1, 2, 4 or 8 mean backward times."""


@compiled
def count_visits(p: Instance, s: Schedule, w: Work) -> None:
    """Count the visits of the stages anew."""
    for stage in range(w.visits.shape[0]):
        w.visits[stage] = 0
    for m in range(s.routes.shape[0]):
        for hop in range(s.lengths[m]):
            w.visits[p.stage_of[s.routes[m, hop]]] += 1


@compiled
def construct(p: Instance, s: Schedule, w: Work, sequence: Integers, wait_s: float) -> bool:
    """Insert the microbatches in `sequence` into an empty schedule and start everything as early as possible.

    Returns False where a slot would get more tasks than its row holds.
    """
    for slot in range(s.placement.shape[0]):
        s.counts[BUSY, slot] = 0
        s.counts[HELD, slot] = 0
    return insert_sequence(p, s, w, sequence, wait_s)


@compiled
def insert_sequence(p: Instance, s: Schedule, w: Work, sequence: Integers, wait_s: float) -> bool:
    """Insert the microbatches in `sequence` into a schedule that is timed; False where it cannot take them.

    That is where a slot would get more tasks than its row holds or, already before, more than its memory.
    """
    if not fits_memory(p, s):
        return False
    for index in range(sequence.shape[0]):
        if not fits_width(s, sequence[index]):
            return False
        insert(p, s, w.chain_s, sequence[index], wait_s, math.inf)
    count_visits(p, s, w)
    return retime(p, s, w.queue, -1)


@compiled
def evaluate(p: Instance, s: Schedule, w: Work, scores: Floats) -> None:
    """Write the iteration time (mean over the samples where there are any) and the score into `scores`."""
    samples = p.factors.shape[0]
    total_s = 0.0
    for sample in range(samples):
        retime(p, s, w.queue, sample)
        total_s += iteration_s(p, s, w.queue)
    if samples:
        retime(p, s, w.queue, -1)
        scores[0] = total_s / samples
    else:
        scores[0] = iteration_s(p, s, w.queue)
    scores[1] = score_s(p, s, w.queue, scores[0])


@compiled
def is_better(scores: Floats) -> bool:
    """Return whether the first row of `scores` (iteration seconds, score) is better than the last."""
    gained_s = scores[2, 0] - scores[0, 0]
    return gained_s > _EPSILON_S or (gained_s > -_EPSILON_S and scores[0, 1] < scores[2, 1] - _EPSILON_S)


@inlined
def _set_scores(scores: Floats, row: int, source: int) -> None:
    """Make a row of `scores` equal to another."""
    scores[row, 0] = scores[source, 0]
    scores[row, 1] = scores[source, 1]


@compiled
def copy_schedule(target: Schedule, source: Schedule) -> None:
    """Make `target` equal to `source`."""
    # The rows BUSY_FROM and BUSY_TO of `times_s` go with BUSY, the others with HELD.
    for m in range(source.routes.shape[0]):
        target.lengths[m] = source.lengths[m]
        for hop in range(source.lengths[m]):
            target.routes[m, hop] = source.routes[m, hop]
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
    total_s = 0.0
    for node in range(p.memory.shape[0]):
        total_s += p.node_s[BACKWARD, node]
    return 0.5 * 2.0 ** below(w.random, _WAITS) * total_s / p.memory.shape[0]


@called
def _exchange_nodes(p: Instance, s: Schedule, w: Work) -> int:
    """Two slots exchange their nodes; choose microbatches to insert again, -1 where a pin or memory forbids it."""
    slots = s.placement.shape[0]
    left = below(w.random, slots)
    right = (left + 1 + below(w.random, slots - 1)) % slots
    if not may_exchange(p, s, left, right):
        return -1
    node = s.placement[left]
    s.placement[left] = s.placement[right]
    s.placement[right] = node
    retime(p, s, w.queue, -1)
    if not fits_memory(p, s):
        return -1
    if uniform(w.random) < _ONLY_EXCHANGE:
        return 0
    return select_visitors(s, w, left, right)


@called
def _destroy_and_repair(p: Instance, s: Schedule, w: Work, count: int, routes: bool, limit_s: float) -> bool:
    """Take the chosen out, perhaps change their routes, insert them again.

    False where a rule forbids it, or one would end after `limit_s`.

    Then the chosen are out and their routes are whatever they are; `w.visits` is as before.
    """
    snapshot(s, w, count)
    for index in range(count):
        remove(s, w.chosen[index])
    if count and routes and uniform(w.random) < _CHANGE_ROUTES:
        perturb(p, s, w, count)
        if uniform(w.random) < _CHANGE_TWICE:
            perturb(p, s, w, count)
    if not obeys_rules(p, s, w, count):
        return False
    shuffle(w, count)
    if uniform(w.random) < _LONGEST_FIRST:
        longest_first(p, s, w, count)
    wait_s = _wait_s(p, w)
    for index in range(count):
        if not fits_width(s, w.chosen[index]) or not insert(p, s, w.chain_s, w.chosen[index], wait_s, limit_s):
            for before in range(index):
                remove(s, w.chosen[before])
            undo_visits(p, s, w, count)
            return False
    return True


@called
def _propose(p: Instance, s: Schedule, w: Work, free_placement: bool) -> int:
    """Make one random change; return how many microbatches were inserted again, -1 where a rule forbids it."""
    if uniform(w.random) < _EXCHANGE_TASKS:
        return 0 if _exchange_tasks(s, w) and fits_memory(p, s) else -1
    exchange = free_placement and uniform(w.random) < _EXCHANGE_NODES
    count = _exchange_nodes(p, s, w) if exchange else select_destroyed(s, w)
    if count < 0 or not _destroy_and_repair(p, s, w, count, not exchange, _NO_LIMIT_S):
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
def _accepts(w: Work, score: float, current: float, temperature_s: float) -> bool:
    return score <= current - temperature_s * math.log(uniform(w.random))


@compiled
def anneal(
    p: Instance,
    current: Schedule,
    candidate: Schedule,
    best: Schedule,
    w: Work,
    scores: Floats,
    steps: int,
    temperature_from_s: float,
    temperature_to_s: float,
    free_placement: bool,
    goal_s: float,
) -> int:
    """Search from `current`, keep the best in `best`; return the steps made, fewer where `goal_s` is reached.

    `scores` (3, 2) holds iteration seconds and score of current, candidate and best.
    """
    for step in range(steps):
        if scores[2, 0] <= goal_s:
            return step
        copy_schedule(candidate, current)
        count = _propose(p, candidate, w, free_placement)
        if count < 0 or not retime(p, candidate, w.queue, -1):
            continue
        evaluate(p, candidate, w, scores[1])
        temperature_s = temperature_from_s + (temperature_to_s - temperature_from_s) * step / steps
        if _accepts(w, scores[1, 1], scores[0, 1], temperature_s):
            copy_schedule(current, candidate)
            _set_scores(scores, 0, 1)
            if is_better(scores):
                copy_schedule(best, current)
                _set_scores(scores, 2, 0)
        else:
            undo_visits(p, candidate, w, count)
            if step % _RETURN_TO_BEST == 0:
                copy_schedule(current, best)
                count_visits(p, current, w)
                _set_scores(scores, 0, 2)
    return steps


@compiled
def anneal_in_place(
    p: Instance,
    current: Schedule,
    best: Schedule,
    w: Work,
    scores: Floats,
    steps: int,
    temperature_from_s: float,
    temperature_to_s: float,
    goal_s: float,
) -> int:
    """Search like `anneal`, for schedules too large to copy at every step; the placement stays."""
    for step in range(steps):
        if scores[2, 0] <= goal_s:
            return step
        temperature_s = temperature_from_s + (temperature_to_s - temperature_from_s) * step / steps
        most = scores[0, 1] - temperature_s * math.log(uniform(w.random))
        # What comes on top of the iteration time hardly changes in one step: who ends this late would be refused.
        limit_s = most - _MARGIN * (scores[0, 1] - scores[0, 0])
        count = select_destroyed(current, w)
        changed = _destroy_and_repair(p, current, w, count, True, limit_s)
        if changed:
            evaluate(p, current, w, scores[1])
        if changed and scores[1, 1] <= most:
            _set_scores(scores, 0, 1)
        else:
            if changed:
                undo_visits(p, current, w, count)
                for index in range(count):
                    remove(current, w.chosen[index])
            for index in range(count):
                restore(p, current, w, w.chosen[index], index)
        if step % _RETIME_EVERY == _RETIME_EVERY - 1 or step == steps - 1:
            retime(p, current, w.queue, -1)
            evaluate(p, current, w, scores[0])
            if is_better(scores):
                copy_schedule(best, current)
                _set_scores(scores, 2, 0)
    return steps
