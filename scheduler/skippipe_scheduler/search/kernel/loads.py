"""Routes and placement under bounds instead of exact times: fast, for a start from which the exact search goes on.

A slot's load is the largest of its work, of what its network card sends and receives where cards are shared, and, by
Little's law (1961), of the time its microbatches are held divided by how many it can hold. Where a link carries one
message at a time, what it carries is a load of its own, and where capacities are shared fairly, what cards and uplinks
carry. The value is a soft maximum of the loads (their 12-norm), plus one of the gradient reductions (their 8-norm) and
a share of the mean round trip. Simulated annealing lowers the value with the moves of `moves`; the norms are kept as
sums of powers, so that a step costs time only for the routes that it changes.
"""

import math
from typing import Final, NamedTuple

import numpy as np

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
    SHARED_LINKS,
    TRANSFER_S,
    WEIGHT,
    Floats,
    Instance,
    Integers,
    Schedule,
    Sharing,
    Work,
)
from skippipe_scheduler.search.kernel.constants import POWER, REDUCTION_WEIGHT, RESCALE_EVERY
from skippipe_scheduler.search.kernel.fair_sharing import used_resource
from skippipe_scheduler.search.kernel.jit import called, compiled, inlined
from skippipe_scheduler.search.kernel.moves import may_exchange, obeys_rules, perturb, snapshot, undo_visits
from skippipe_scheduler.search.kernel.reduction_time import loose_reduction_s
from skippipe_scheduler.search.kernel.tasks import below, uniform

_HELD, _BUSY, _OUT, _IN, _SHARE, _SUMS, _CARRIED, _CARRIED_SHARE, _REDUCTION_S_OF = 0, 1, 2, 3, 4, 5, 6, 7, 8
"""Rows of `loads`: by slot seconds held, busy, sending and receiving, and the share's power; the sums below; by what
transfers share seconds in which it carries them, and the power of that; by stage seconds of its reduction."""
KEPT: Final = 9
"""As many rows behind these: the same before an exchange, so that it can be taken back."""
_POWERS, _TRIPS_S, _REDUCTION_S, _UNIT_S = 0, 1, 2, 3
"""Of the sums: powers of all shares, seconds of all round trips, of the reductions, and of a share of 1."""


class Loads(NamedTuple):
    """Working memory."""

    rows: Floats  # (2 KEPT, the more of slots, stages, what is shared, and sums), see above
    messages: Integers  # (slots, slots) activations and gradients from slot to slot; empty where links are no loads


class Balancing(NamedTuple):
    """One stretch of an annealing of the loads."""

    steps: int
    temperature: float
    """Rise that is accepted at first, as a share of the value."""
    cooling: float
    """What of the temperature is left at the end, as a share of it."""
    exchange_share: float
    """Share of the steps that exchange two nodes."""
    exchange_heat: float
    """How many times as hot these are."""
    trip_weight: float
    """Weight of the mean round trip beside the loads."""


def empty_loads(instance: Instance, resources: int) -> Loads:
    """Return working memory for a problem whose transfers share so many resources."""
    slots = instance.stage_of.shape[0]
    ends = slots if instance.contention in (SHARED_LINKS, SHARED_CAPACITY) else 0
    return Loads(np.zeros((2 * KEPT, max(slots, resources, KEPT))), np.zeros((ends, ends), np.int64))


@compiled
def anneal_loads(
    p: Instance,
    s: Schedule,
    w: Work,
    sharing: Sharing,
    loads: Loads,
    balancing: Balancing,
) -> float:
    """Change routes, and exchange nodes; return the value reached in seconds. `loads` is working memory."""
    for stage in range(w.visits.shape[0]):
        w.visits[stage] = 0
    for m in range(s.routes.shape[0]):
        for hop in range(s.lengths[m]):
            w.visits[p.stage_of[s.routes[m, hop]]] += 1
    _rescale(p, s, sharing, loads)
    value_s = _objective_s(s, loads, balancing.trip_weight)
    for step in range(balancing.steps):
        temperature_s = balancing.temperature * value_s * balancing.cooling ** (step / balancing.steps)
        # Powers of what is refused can be so large that taking them away again would leave a rounding error.
        powers = loads.rows[_SUMS, _POWERS]
        # Metropolis' rule, solved for the value: what is at most this is accepted.
        rise_s = -temperature_s * math.log(uniform(w.random))
        exchanges = uniform(w.random) < balancing.exchange_share
        most = value_s + (balancing.exchange_heat * rise_s if exchanges else rise_s)
        if exchanges:
            left = below(w.random, s.placement.shape[0])
            right = below(w.random, s.placement.shape[0])
            if not may_exchange(p, s, left, right):
                continue
            _copy_rows(loads, 0, KEPT)
            _exchange(p, s, sharing, loads, left, right)
            changed_s = _objective_s(s, loads, balancing.trip_weight)
            if changed_s > most:
                _exchange_nodes(s, left, right)
                _copy_rows(loads, KEPT, 0)
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
            changed_s = _objective_s(s, loads, balancing.trip_weight)
            if changed_s > most:
                # Old and new routes change places, and the loads move back.
                undo_visits(p, s, w, count)
                for index in range(count):
                    _swap_saved(s, w, index)
                _move_loads(p, s, w, sharing, loads, count)
                loads.rows[_SUMS, _POWERS] = powers
                continue
        value_s = changed_s
        if step % RESCALE_EVERY == 0:
            _rescale(p, s, sharing, loads)
            value_s = _objective_s(s, loads, balancing.trip_weight)
    return value_s


@called
def _move_loads(p: Instance, s: Schedule, w: Work, sharing: Sharing, loads: Loads, count: int) -> None:
    """Count the loads of the chosen on their routes instead of on those saved."""
    for index in range(count):
        _swap_saved(s, w, index)
        _add_load(p, s, sharing, loads, w.chosen[index], -1)
        _swap_saved(s, w, index)
        _add_load(p, s, sharing, loads, w.chosen[index], 1)


@called
def _add_load(p: Instance, s: Schedule, sharing: Sharing, loads: Loads, m: int, sign: int) -> None:
    """Add `m` to the loads of its slots and to the sums (take it away with sign -1)."""
    if loads.messages.shape[0]:
        _add_to_links(p, s, loads, m, sign)
    _add_messages(p, s, sharing, loads, m, sign, NOBODY, NOBODY)
    _add_times(p, s, loads, m, sign)
    for hop in range(s.lengths[m]):
        _count_share(loads, s.routes[m, hop])


@called
def _add_times(p: Instance, s: Schedule, loads: Loads, m: int, sign: float) -> None:
    """Add the seconds for which `m` is held and worked on; the powers of the slots' shares are left as they are."""
    length = s.lengths[m]
    origin = s.placement[s.routes[m, 0]]
    after = origin
    rest_s = p.node_s[LOSS, origin]
    # From the last hop back to the origin: what is held there lasts for all that comes behind it, both ways.
    for back in range(length):
        slot = s.routes[m, length - 1 - back]
        node = s.placement[slot]
        work_s = (p.node_s[FORWARD, node] + p.node_s[BACKWARD, node]) * p.stages[WEIGHT, p.stage_of[slot]]
        rest_s += work_s + p.links[TRANSFER_S, node, after] + p.links[TRANSFER_S, after, node]
        loads.rows[_HELD, slot] += sign * rest_s / p.memory[node]
        loads.rows[_BUSY, slot] += sign * (work_s + 2 * p.overhead_s)
        after = node
    loads.rows[_SUMS, _TRIPS_S] += sign * rest_s


@inlined
def _count_share(loads: Loads, slot: int) -> None:
    """Bring the power of a slot's share, and the sum of all powers, up to date."""
    load_s = max(loads.rows[_HELD, slot], loads.rows[_BUSY, slot], loads.rows[_OUT, slot], loads.rows[_IN, slot])
    power = _power(load_s / loads.rows[_SUMS, _UNIT_S])
    loads.rows[_SUMS, _POWERS] += power - loads.rows[_SHARE, slot]
    loads.rows[_SHARE, slot] = power


@called
def _add_messages(
    p: Instance, s: Schedule, sharing: Sharing, loads: Loads, m: int, sign: float, left: int, right: int
) -> None:
    """Add what `m` sends on its route, back to its origin and the whole way again, to what carries it.

    With two slots `left` and `right`, only the messages from and to these.
    """
    if p.contention not in (SHARED_CARDS, SHARED_CAPACITY):
        return
    length = s.lengths[m]
    for hop in range(length):
        source = s.routes[m, hop]
        sink = s.routes[m, hop + 1 if hop + 1 < length else 0]
        if left != NOBODY and source not in (left, right) and sink not in (left, right):
            continue
        if p.contention == SHARED_CARDS:
            _add_to_cards(p, s, loads, source, sink, sign)
        else:
            _add_to_shared(p, s, sharing, loads, s.placement[source], s.placement[sink], sign)


@called
def _add_to_links(p: Instance, s: Schedule, loads: Loads, m: int, sign: int) -> None:
    """Add what `m` sends on its route, back to its origin and the whole way again, to the links."""
    length = s.lengths[m]
    for hop in range(length):
        source = s.routes[m, hop]
        sink = s.routes[m, hop + 1 if hop + 1 < length else 0]
        loads.rows[_SUMS, _POWERS] -= _link_powers(p, s, loads, source, sink)
        loads.messages[source, sink] += sign
        loads.messages[sink, source] += sign
        loads.rows[_SUMS, _POWERS] += _link_powers(p, s, loads, source, sink)


@inlined
def _link_powers(p: Instance, s: Schedule, loads: Loads, source: int, sink: int) -> float:
    """Return the powers of what the links between two slots carry, both ways."""
    here = s.placement[source]
    there = s.placement[sink]
    each_way_s = loads.messages[source, sink] / loads.rows[_SUMS, _UNIT_S]
    return _power(each_way_s * p.links[OCCUPANCY_S, here, there]) + _power(
        each_way_s * p.links[OCCUPANCY_S, there, here]
    )


@called
def _count_links_of(p: Instance, s: Schedule, loads: Loads, left: int, right: int, sign: float) -> None:
    """Add the powers of all links of two slots to the sum (take them away with sign -1)."""
    if not loads.messages.shape[0]:
        return
    for slot in range(s.placement.shape[0]):
        if loads.messages[left, slot]:
            loads.rows[_SUMS, _POWERS] += sign * _link_powers(p, s, loads, left, slot)
        if loads.messages[right, slot] and slot != left:
            loads.rows[_SUMS, _POWERS] += sign * _link_powers(p, s, loads, right, slot)


@inlined
def _add_to_cards(p: Instance, s: Schedule, loads: Loads, source: int, sink: int, sign: float) -> None:
    """Add an activation and its gradient to the cards at both ends."""
    ahead_s = sign * p.links[OCCUPANCY_S, s.placement[source], s.placement[sink]]
    back_s = sign * p.links[OCCUPANCY_S, s.placement[sink], s.placement[source]]
    loads.rows[_OUT, source] += ahead_s
    loads.rows[_IN, sink] += ahead_s
    loads.rows[_OUT, sink] += back_s
    loads.rows[_IN, source] += back_s


@inlined
def _add_to_shared(
    p: Instance, s: Schedule, sharing: Sharing, loads: Loads, source: int, sink: int, sign: float
) -> None:
    """Add an activation from a node to another, and its gradient, to the cards and uplinks on the way."""
    gbit = sign * p.links[OCCUPANCY_S, source, sink] * p.links[GBIT_PER_S, source, sink]
    for number in range(sharing.numbers.shape[0] - FIRST_USED):
        _add_carried(sharing, loads, used_resource(sharing, source, sink, number), gbit)
        _add_carried(sharing, loads, used_resource(sharing, sink, source, number), gbit)


@inlined
def _add_carried(sharing: Sharing, loads: Loads, resource: int, gbit: float) -> None:
    """Add bits to a card or uplink."""
    if resource != NOBODY:
        loads.rows[_CARRIED, resource] += gbit / sharing.resources[CAPACITY, resource]
        power = _power(loads.rows[_CARRIED, resource] / loads.rows[_SUMS, _UNIT_S])
        loads.rows[_SUMS, _POWERS] += power - loads.rows[_CARRIED_SHARE, resource]
        loads.rows[_CARRIED_SHARE, resource] = power


@inlined
def _power(share: float) -> float:
    """Return the share to the power of `POWER`."""
    square = share * share
    fourth = square * square
    return fourth * fourth * fourth


@called
def _rescale(p: Instance, s: Schedule, sharing: Sharing, loads: Loads) -> None:
    """Count everything anew, in units of the largest load."""
    for slot in range(s.placement.shape[0]):
        loads.rows[_HELD, slot] = 0.0
        loads.rows[_BUSY, slot] = 0.0
        loads.rows[_OUT, slot] = 0.0
        loads.rows[_IN, slot] = 0.0
        loads.rows[_SHARE, slot] = 0.0
    for resource in range(sharing.resources.shape[1]):
        loads.rows[_CARRIED, resource] = 0.0
        loads.rows[_CARRIED_SHARE, resource] = 0.0
    for source in range(loads.messages.shape[0]):
        for sink in range(loads.messages.shape[1]):
            loads.messages[source, sink] = 0
    loads.rows[_SUMS, _TRIPS_S] = 0.0
    loads.rows[_SUMS, _UNIT_S] = 1.0
    for m in range(s.routes.shape[0]):
        _add_load(p, s, sharing, loads, m, 1)
    unit_s = 1e-300
    for slot in range(s.placement.shape[0]):
        unit_s = max(
            unit_s, loads.rows[_HELD, slot], loads.rows[_BUSY, slot], loads.rows[_OUT, slot], loads.rows[_IN, slot]
        )
    for resource in range(sharing.resources.shape[1]):
        unit_s = max(unit_s, loads.rows[_CARRIED, resource])
    for source in range(loads.messages.shape[0]):
        for sink in range(loads.messages.shape[1]):
            occupied_s = p.links[OCCUPANCY_S, s.placement[source], s.placement[sink]]
            unit_s = max(unit_s, loads.messages[source, sink] * occupied_s)
    loads.rows[_SUMS, _UNIT_S] = unit_s
    loads.rows[_SUMS, _POWERS] = 0.0
    for source in range(loads.messages.shape[0]):
        for sink in range(source):
            loads.rows[_SUMS, _POWERS] += _link_powers(p, s, loads, source, sink)
    for slot in range(s.placement.shape[0]):
        loads.rows[_SHARE, slot] = 0.0
        _count_share(loads, slot)
    for resource in range(sharing.resources.shape[1]):
        loads.rows[_CARRIED_SHARE, resource] = _power(loads.rows[_CARRIED, resource] / unit_s)
        loads.rows[_SUMS, _POWERS] += loads.rows[_CARRIED_SHARE, resource]
    for stage in range(p.stages.shape[1]):
        loads.rows[_REDUCTION_S_OF, stage] = loose_reduction_s(p, s, sharing, stage)
    loads.rows[_SUMS, _REDUCTION_S] = _reductions_s(p, loads)


@called
def _reductions_s(p: Instance, loads: Loads) -> float:
    """Return a soft maximum of the seconds of all gradient reductions: their 8-norm."""
    slowest_s = 0.0
    for stage in range(p.stages.shape[1]):
        slowest_s = max(slowest_s, loads.rows[_REDUCTION_S_OF, stage])
    if slowest_s == 0.0:
        return 0.0
    powers = 0.0
    for stage in range(p.stages.shape[1]):
        share = loads.rows[_REDUCTION_S_OF, stage] / slowest_s
        powers += (share * share) ** 4
    return slowest_s * powers**0.125


@inlined
def _objective_s(s: Schedule, loads: Loads, trip_weight: float) -> float:
    """Return the value in seconds: the norm of the loads, a share of the mean trip, a share of the reduction."""
    loads_s = loads.rows[_SUMS, _UNIT_S] * max(0.0, loads.rows[_SUMS, _POWERS]) ** (1.0 / POWER)
    trip_s = loads.rows[_SUMS, _TRIPS_S] / s.routes.shape[0]
    return loads_s + REDUCTION_WEIGHT * loads.rows[_SUMS, _REDUCTION_S] + trip_weight * trip_s


@called
def _exchange(p: Instance, s: Schedule, sharing: Sharing, loads: Loads, left: int, right: int) -> None:
    """Two slots exchange their nodes."""
    _count_links_of(p, s, loads, left, right, -1.0)
    _add_visitors(p, s, sharing, loads, left, right, -1.0)
    _exchange_nodes(s, left, right)
    _add_visitors(p, s, sharing, loads, left, right, 1.0)
    _count_links_of(p, s, loads, left, right, 1.0)
    # Whoever visits one of the two is held longer or shorter at every slot before it.
    for slot in range(s.placement.shape[0]):
        _count_share(loads, slot)
    for slot in (left, right):
        stage = p.stage_of[slot]
        loads.rows[_REDUCTION_S_OF, stage] = loose_reduction_s(p, s, sharing, stage)
    loads.rows[_SUMS, _REDUCTION_S] = _reductions_s(p, loads)


@inlined
def _exchange_nodes(s: Schedule, left: int, right: int) -> None:
    node = s.placement[left]
    s.placement[left] = s.placement[right]
    s.placement[right] = node


@inlined
def _copy_rows(loads: Loads, source: int, sink: int) -> None:
    """Copy what is counted from some rows to others."""
    for row in range(KEPT):
        for column in range(loads.rows.shape[1]):
            loads.rows[sink + row, column] = loads.rows[source + row, column]


@called
def _add_visitors(p: Instance, s: Schedule, sharing: Sharing, loads: Loads, left: int, right: int, sign: float) -> None:
    """Count all that visit one of two slots: their times, and the messages from and to the two."""
    for m in range(s.routes.shape[0]):
        for hop in range(s.lengths[m]):
            if s.routes[m, hop] == left or s.routes[m, hop] == right:
                _add_times(p, s, loads, m, sign)
                _add_messages(p, s, sharing, loads, m, sign, left, right)
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
