"""Routes and placement under bounds instead of exact times: fast, for a start from which the exact search goes on.

A slot's load is the largest of its work, of what its network card sends and receives where cards are shared, and, by
Little's law (1961), of the time its microbatches are held divided by how many it can hold. Where capacities are shared
fairly, what cards and uplinks carry are loads of their own. The value is a soft maximum of the loads (their 12-norm),
plus one of the gradient reductions (their 8-norm) and a share of the mean round trip. Simulated annealing lowers the
value with the moves of `moves`; the norms are kept as sums of powers, so that a step costs time only for the routes
that it changes.
"""

import math
from typing import Final

from skippipe_scheduler.search.kernel.arrays import (
    BACKWARD,
    CAPACITY,
    FIRST_USED,
    FORWARD,
    GBIT_PER_S,
    LENGTH,
    LOSS,
    NOBODY,
    OCCUPANCY_S,
    SHARED_CAPACITY,
    SHARED_CARDS,
    TRANSFER_S,
    WEIGHT,
    Floats,
    Instance,
    Schedule,
    Sharing,
    Work,
)
from skippipe_scheduler.search.kernel.constants import POWER, REDUCTION_WEIGHT, RESCALE_EVERY, TRIP_WEIGHT
from skippipe_scheduler.search.kernel.fair_sharing import used_resource
from skippipe_scheduler.search.kernel.jit import called, compiled, inlined
from skippipe_scheduler.search.kernel.moves import may_exchange, obeys_rules, perturb, snapshot, undo_visits
from skippipe_scheduler.search.kernel.reduction_time import loose_reduction_s
from skippipe_scheduler.search.kernel.tasks import below, uniform

_HELD, _BUSY, _OUT, _IN, _SHARE, _SUMS, _CARRIED, _CARRIED_SHARE = 0, 1, 2, 3, 4, 5, 6, 7
"""Rows of `loads`: by slot seconds held, busy, sending and receiving, and the share's power; the sums below; by what
transfers share seconds in which it carries them, and the power of that."""
ROWS: Final = 8
_POWERS, _TRIPS_S, _REDUCTION_S, _UNIT_S = 0, 1, 2, 3
"""Of the sums: powers of all shares, seconds of all round trips, of the reductions, and of a share of 1."""


@compiled
def anneal_loads(
    p: Instance,
    s: Schedule,
    w: Work,
    sharing: Sharing,
    loads: Floats,
    steps: int,
    temperature: float,
    cooling: float,
    exchange_share: float,
    exchange_heat: float,
) -> float:
    """Change routes (and exchange nodes, in `exchange_share` of the steps); return the value reached.

    `loads` (`ROWS`, the more of slots and what is shared) is working memory. The temperature, relative to the value,
    falls from `temperature` to `cooling` times that; for exchanges it is `exchange_heat` times as high.
    """
    for stage in range(w.visits.shape[0]):
        w.visits[stage] = 0
    for m in range(s.routes.shape[0]):
        for hop in range(s.lengths[m]):
            w.visits[p.stage_of[s.routes[m, hop]]] += 1
    _rescale(p, s, sharing, loads)
    value_s = _objective_s(p, s, loads)
    for step in range(steps):
        temperature_s = temperature * value_s * cooling ** (step / steps)
        # Powers of what is refused can be so large that taking them away again would leave a rounding error.
        powers = loads[_SUMS, _POWERS]
        # Metropolis' rule, solved for the value: what is at most this is accepted.
        rise_s = -temperature_s * math.log(uniform(w.random))
        exchanges = uniform(w.random) < exchange_share
        most = value_s + (exchange_heat * rise_s if exchanges else rise_s)
        if exchanges:
            left = below(w.random, s.placement.shape[0])
            right = below(w.random, s.placement.shape[0])
            if not may_exchange(p, s, left, right):
                continue
            _exchange(p, s, sharing, loads, left, right)
            changed_s = _objective_s(p, s, loads)
            if changed_s > most:
                _exchange(p, s, sharing, loads, left, right)
                loads[_SUMS, _POWERS] = powers
                continue
        else:
            count = 1 + below(w.random, 2)
            w.chosen[0] = below(w.random, s.routes.shape[0])
            w.chosen[1] = below(w.random, s.routes.shape[0])
            if count == 2 and w.chosen[0] == w.chosen[1]:
                continue
            snapshot(s, w, count)
            perturb(p, s, w, count)
            if not obeys_rules(p, s, w, count):
                _put_back(s, w, count)
                continue
            _move_loads(p, s, w, sharing, loads, count)
            changed_s = _objective_s(p, s, loads)
            if changed_s > most:
                # Old and new routes change places, and the loads move back.
                undo_visits(p, s, w, count)
                for index in range(count):
                    _swap_saved(s, w, index)
                _move_loads(p, s, w, sharing, loads, count)
                loads[_SUMS, _POWERS] = powers
                continue
        value_s = changed_s
        if step % RESCALE_EVERY == 0:
            _rescale(p, s, sharing, loads)
            value_s = _objective_s(p, s, loads)
    return value_s


@called
def _move_loads(p: Instance, s: Schedule, w: Work, sharing: Sharing, loads: Floats, count: int) -> None:
    """Count the loads of the chosen on their routes instead of on those saved."""
    for index in range(count):
        _swap_saved(s, w, index)
        _add_load(p, s, sharing, loads, w.chosen[index], -1.0)
        _swap_saved(s, w, index)
        _add_load(p, s, sharing, loads, w.chosen[index], 1.0)


@called
def _add_load(p: Instance, s: Schedule, sharing: Sharing, loads: Floats, m: int, sign: float) -> None:
    """Add `m` to the loads of its slots and to the sums (take it away with sign -1)."""
    length = s.lengths[m]
    origin = s.placement[s.routes[m, 0]]
    after = origin
    rest_s = p.node_s[LOSS, origin]
    if p.contention == SHARED_CARDS:
        _add_to_cards(p, s, loads, m, sign)
    elif p.contention == SHARED_CAPACITY:
        _add_to_shared(p, s, sharing, loads, m, sign)
    unit_s = loads[_SUMS, _UNIT_S]
    powers = loads[_SUMS, _POWERS]
    # From the last hop back to the origin: what is held there lasts for all that comes behind it, both ways.
    for back in range(length):
        slot = s.routes[m, length - 1 - back]
        node = s.placement[slot]
        work_s = (p.node_s[FORWARD, node] + p.node_s[BACKWARD, node]) * p.stages[WEIGHT, p.stage_of[slot]]
        rest_s += work_s + p.links[TRANSFER_S, node, after] + p.links[TRANSFER_S, after, node]
        loads[_HELD, slot] += sign * rest_s / p.memory[node]
        loads[_BUSY, slot] += sign * (work_s + 2 * p.overhead_s)
        power = _power(_load_s(loads, slot) / unit_s)
        powers += power - loads[_SHARE, slot]
        loads[_SHARE, slot] = power
        after = node
    loads[_SUMS, _POWERS] = powers
    loads[_SUMS, _TRIPS_S] += sign * rest_s


@inlined
def _load_s(loads: Floats, slot: int) -> float:
    """Return the slot's load in seconds."""
    return max(loads[_HELD, slot], loads[_BUSY, slot], loads[_OUT, slot], loads[_IN, slot])


@called
def _add_to_cards(p: Instance, s: Schedule, loads: Floats, m: int, sign: float) -> None:
    """Add what `m` sends on its route, back to its origin and the whole way again, to the cards at both ends."""
    length = s.lengths[m]
    for hop in range(length):
        source = s.routes[m, hop]
        sink = s.routes[m, hop + 1] if hop + 1 < length else s.routes[m, 0]
        ahead_s = sign * p.links[OCCUPANCY_S, s.placement[source], s.placement[sink]]
        back_s = sign * p.links[OCCUPANCY_S, s.placement[sink], s.placement[source]]
        loads[_OUT, source] += ahead_s
        loads[_IN, sink] += ahead_s
        loads[_OUT, sink] += back_s
        loads[_IN, source] += back_s


@called
def _add_to_shared(p: Instance, s: Schedule, sharing: Sharing, loads: Floats, m: int, sign: float) -> None:
    """Add what `m` sends, both ways, to the cards and uplinks that it uses, and to the sums."""
    length = s.lengths[m]
    for hop in range(length):
        source = s.placement[s.routes[m, hop]]
        sink = s.placement[s.routes[m, hop + 1 if hop + 1 < length else 0]]
        gbit = sign * p.links[OCCUPANCY_S, source, sink] * p.links[GBIT_PER_S, source, sink]
        for number in range(sharing.numbers.shape[0] - FIRST_USED):
            _add_carried(sharing, loads, used_resource(sharing, source, sink, number), gbit)
            _add_carried(sharing, loads, used_resource(sharing, sink, source, number), gbit)


@inlined
def _add_carried(sharing: Sharing, loads: Floats, resource: int, gbit: float) -> None:
    """Add bits to a card or uplink."""
    if resource != NOBODY:
        loads[_CARRIED, resource] += gbit / sharing.resources[CAPACITY, resource]
        power = _power(loads[_CARRIED, resource] / loads[_SUMS, _UNIT_S])
        loads[_SUMS, _POWERS] += power - loads[_CARRIED_SHARE, resource]
        loads[_CARRIED_SHARE, resource] = power


@inlined
def _power(share: float) -> float:
    """Return the share to the power of `POWER`."""
    square = share * share
    fourth = square * square
    return fourth * fourth * fourth


@called
def _rescale(p: Instance, s: Schedule, sharing: Sharing, loads: Floats) -> None:
    """Count everything anew, in units of the largest load."""
    for slot in range(s.placement.shape[0]):
        loads[_HELD, slot] = 0.0
        loads[_BUSY, slot] = 0.0
        loads[_OUT, slot] = 0.0
        loads[_IN, slot] = 0.0
        loads[_SHARE, slot] = 0.0
    for resource in range(sharing.resources.shape[1]):
        loads[_CARRIED, resource] = 0.0
        loads[_CARRIED_SHARE, resource] = 0.0
    loads[_SUMS, _TRIPS_S] = 0.0
    loads[_SUMS, _UNIT_S] = 1.0
    for m in range(s.routes.shape[0]):
        _add_load(p, s, sharing, loads, m, 1.0)
    unit_s = 1e-300
    for slot in range(s.placement.shape[0]):
        unit_s = max(unit_s, _load_s(loads, slot))
    for resource in range(sharing.resources.shape[1]):
        unit_s = max(unit_s, loads[_CARRIED, resource])
    loads[_SUMS, _UNIT_S] = unit_s
    loads[_SUMS, _POWERS] = 0.0
    for slot in range(s.placement.shape[0]):
        loads[_SHARE, slot] = _power(_load_s(loads, slot) / unit_s)
        loads[_SUMS, _POWERS] += loads[_SHARE, slot]
    for resource in range(sharing.resources.shape[1]):
        loads[_CARRIED_SHARE, resource] = _power(loads[_CARRIED, resource] / unit_s)
        loads[_SUMS, _POWERS] += loads[_CARRIED_SHARE, resource]
    loads[_SUMS, _REDUCTION_S] = _reductions_s(p, s, sharing)


@called
def _reductions_s(p: Instance, s: Schedule, sharing: Sharing) -> float:
    """Return a soft maximum of the seconds of all gradient reductions: their 8-norm."""
    slowest_s = 0.0
    for stage in range(p.stages.shape[1]):
        slowest_s = max(slowest_s, loose_reduction_s(p, s, sharing, stage))
    if slowest_s == 0.0:
        return 0.0
    powers = 0.0
    for stage in range(p.stages.shape[1]):
        share = loose_reduction_s(p, s, sharing, stage) / slowest_s
        powers += (share * share) ** 4
    return slowest_s * powers**0.125


@inlined
def _objective_s(p: Instance, s: Schedule, loads: Floats) -> float:
    """Return the value in seconds: the norm of the loads, a share of the mean trip, a share of the reduction."""
    loads_s = loads[_SUMS, _UNIT_S] * max(0.0, loads[_SUMS, _POWERS]) ** (1.0 / POWER)
    trip_s = loads[_SUMS, _TRIPS_S] / s.routes.shape[0]
    return loads_s + REDUCTION_WEIGHT * loads[_SUMS, _REDUCTION_S] + TRIP_WEIGHT * trip_s


@called
def _exchange(p: Instance, s: Schedule, sharing: Sharing, loads: Floats, left: int, right: int) -> None:
    """Two slots exchange their nodes."""
    _add_visitors(p, s, sharing, loads, left, right, -1.0)
    node = s.placement[left]
    s.placement[left] = s.placement[right]
    s.placement[right] = node
    _add_visitors(p, s, sharing, loads, left, right, 1.0)
    loads[_SUMS, _REDUCTION_S] = _reductions_s(p, s, sharing)


@called
def _add_visitors(
    p: Instance, s: Schedule, sharing: Sharing, loads: Floats, left: int, right: int, sign: float
) -> None:
    """Count all that visit one of two slots."""
    for m in range(s.routes.shape[0]):
        for hop in range(s.lengths[m]):
            if s.routes[m, hop] == left or s.routes[m, hop] == right:
                _add_load(p, s, sharing, loads, m, sign)
                break


@inlined
def _put_back(s: Schedule, w: Work, count: int) -> None:
    """Give the chosen their saved routes again."""
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
