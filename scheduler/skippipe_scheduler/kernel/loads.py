"""Routes and placement under bounds instead of exact times: fast, for a start from which the exact search goes on.

A slot's load is the larger of its work and, by Little's law, the time its microbatches are held divided by how many
it can hold. The value is a soft maximum of the loads, plus half the slowest gradient reduction and a share of the mean
round trip.
"""

import math

from skippipe_scheduler.kernel.arrays import (
    BACKWARD,
    FORWARD,
    LENGTH,
    LOSS,
    TRANSFER_S,
    WEIGHT,
    Floats,
    Instance,
    Schedule,
    Work,
)
from skippipe_scheduler.kernel.jit import called, compiled, inlined
from skippipe_scheduler.kernel.moves import forget, may_exchange, move, obeys_rules, save
from skippipe_scheduler.kernel.tasks import below, uniform
from skippipe_scheduler.kernel.timing import reduction_s

_POWER = 12
_TRIP_WEIGHT = 0.2
_HELD, _BUSY = 0, 1


@compiled
def anneal_loads(
    p: Instance, s: Schedule, best: Schedule, w: Work, loads: Floats, steps: int, heat: float, exchange_share: float
) -> float:
    """Change routes (and exchange nodes, in `exchange_share` of the steps); the best go to `best`; return its value.

    `loads` (3, slots) is working memory. Acceptance falls from `heat` (relative to the value) to nothing.
    """
    for stage in range(w.visits.shape[0]):
        w.visits[stage] = 0
    for m in range(s.routes.shape[0]):
        for hop in range(s.lengths[m]):
            w.visits[p.stage_of[s.routes[m, hop]]] += 1
    trips_s = _count_all(p, s, loads)
    value = _value(p, s, loads, trips_s)
    lowest = value
    _keep(best, s)
    for step in range(steps):
        heat_s = heat * lowest * (1 - step / steps) ** 2
        if uniform(w.random) < exchange_share:
            left = below(w.random, s.placement.shape[0])
            right = below(w.random, s.placement.shape[0])
            if not may_exchange(p, s, left, right):
                continue
            _exchange(s, left, right)
            changed_s = _count_all(p, s, loads)
            changed = _value(p, s, loads, changed_s)
            if changed > value - heat_s * math.log(uniform(w.random)):
                _exchange(s, left, right)
                trips_s = _count_all(p, s, loads)
                continue
        else:
            count = 1 + below(w.random, 2)
            w.chosen[0] = below(w.random, s.routes.shape[0])
            w.chosen[1] = below(w.random, s.routes.shape[0])
            if count == 2 and w.chosen[0] == w.chosen[1]:
                continue
            save(s, w, count)
            move(p, s, w, count)
            if not obeys_rules(p, s, w, count):
                _put_back(s, w, count)
                continue
            changed_s = trips_s
            for index in range(count):
                changed_s += _count(p, s, loads, w.chosen[index], 1.0)
                _swap_saved(s, w, index)
                changed_s += _count(p, s, loads, w.chosen[index], -1.0)
                _swap_saved(s, w, index)
            changed = _value(p, s, loads, changed_s)
            if changed > value - heat_s * math.log(uniform(w.random)):
                forget(p, s, w, count)
                for index in range(count):
                    _count(p, s, loads, w.chosen[index], -1.0)
                _put_back(s, w, count)
                for index in range(count):
                    _count(p, s, loads, w.chosen[index], 1.0)
                continue
        value = changed
        trips_s = changed_s
        if value < lowest - 1e-12:
            lowest = value
            _keep(best, s)
    return lowest


@called
def _count(p: Instance, s: Schedule, loads: Floats, m: int, sign: float) -> float:
    """Add `m` to the loads of its slots (take it away with sign -1); return its round trip, signed."""
    length = s.lengths[m]
    origin = s.placement[s.routes[m, 0]]
    after = origin
    rest_s = p.node_s[LOSS, origin]
    for back in range(length):
        slot = s.routes[m, length - 1 - back]
        node = s.placement[slot]
        work_s = (p.node_s[FORWARD, node] + p.node_s[BACKWARD, node]) * p.stages[WEIGHT, p.stage_of[slot]]
        rest_s += work_s + p.links[TRANSFER_S, node, after] + p.links[TRANSFER_S, after, node]
        loads[_HELD, slot] += sign * rest_s / p.memory[node]
        loads[_BUSY, slot] += sign * (work_s + 2 * p.overhead_s)
        after = node
    return sign * rest_s


@called
def _count_all(p: Instance, s: Schedule, loads: Floats) -> float:
    for slot in range(s.placement.shape[0]):
        loads[_HELD, slot] = 0.0
        loads[_BUSY, slot] = 0.0
    total_s = 0.0
    for m in range(s.routes.shape[0]):
        total_s += _count(p, s, loads, m, 1.0)
    return total_s


@called
def _value(p: Instance, s: Schedule, loads: Floats, trips_s: float) -> float:
    longest_s = 1e-300
    for slot in range(s.placement.shape[0]):
        longest_s = max(longest_s, loads[_HELD, slot], loads[_BUSY, slot])
    total = 0.0
    for slot in range(s.placement.shape[0]):
        share = max(loads[_HELD, slot], loads[_BUSY, slot]) / longest_s
        square = share * share
        fourth = square * square
        total += fourth * fourth * fourth
    slowest_s = 0.0
    for stage in range(p.stages.shape[1]):
        slowest_s = max(slowest_s, reduction_s(p, s, stage))
    return longest_s * total ** (1.0 / _POWER) + 0.5 * slowest_s + _TRIP_WEIGHT * trips_s / s.routes.shape[0]


@inlined
def _exchange(s: Schedule, left: int, right: int) -> None:
    node = s.placement[left]
    s.placement[left] = s.placement[right]
    s.placement[right] = node


@inlined
def _put_back(s: Schedule, w: Work, count: int) -> None:
    for index in range(count):
        m = w.chosen[index]
        s.lengths[m] = w.saved[index, LENGTH]
        for hop in range(s.lengths[m]):
            s.routes[m, hop] = w.saved[index, hop]


@inlined
def _swap_saved(s: Schedule, w: Work, index: int) -> None:
    """Exchange a chosen microbatch's route with the saved one."""
    m = w.chosen[index]
    length = s.lengths[m]
    s.lengths[m] = w.saved[index, LENGTH]
    w.saved[index, LENGTH] = length
    for hop in range(s.routes.shape[1]):
        slot = s.routes[m, hop]
        s.routes[m, hop] = w.saved[index, hop]
        w.saved[index, hop] = slot


@called
def _keep(best: Schedule, s: Schedule) -> None:
    for slot in range(s.placement.shape[0]):
        best.placement[slot] = s.placement[slot]
    for m in range(s.routes.shape[0]):
        best.lengths[m] = s.lengths[m]
        for hop in range(s.lengths[m]):
            best.routes[m, hop] = s.routes[m, hop]
