"""The chain of a microbatch: P forwards, the loss at the origin, P backwards; random numbers."""

from skippipe_scheduler.search.kernel.arrays import (
    BACKWARD,
    FORWARD,
    LOSS,
    TRANSFER_S,
    WEIGHT,
    Instance,
    Integers,
    Schedule,
)
from skippipe_scheduler.search.kernel.jit import called, inlined


@inlined
def hop_of(index: int, length: int) -> int:
    """Return the hop at which task `index` of a chain runs."""
    if index < length:
        return index
    if index == length:
        return 0
    return 2 * length - index


@inlined
def slot_of(s: Schedule, m: int, index: int) -> int:
    """Return the slot of task `index` of microbatch `m`."""
    return s.routes[m, hop_of(index, s.lengths[m])]


@inlined
def only_relays(s: Schedule, m: int, index: int) -> bool:
    """Return whether task `index` of microbatch `m` only relays: it takes no time and begins or ends no stay."""
    return s.relays[m, hop_of(index, s.lengths[m])] != 0


@inlined
def duration_s(p: Instance, s: Schedule, m: int, index: int) -> float:
    """Return the duration of task `index` of microbatch `m`."""
    slot = slot_of(s, m, index)
    node = s.placement[slot]
    if only_relays(s, m, index):
        return 0.0
    if index < s.lengths[m]:
        return p.node_s[FORWARD, node] * p.stages[WEIGHT, p.stage_of[slot]]
    if index == s.lengths[m]:
        return p.node_s[LOSS, node]
    return p.node_s[BACKWARD, node] * p.stages[WEIGHT, p.stage_of[slot]]


@inlined
def delay_s(p: Instance, s: Schedule, m: int, index: int) -> float:
    """Return the transfer time after task `index` of microbatch `m`, alone on its link."""
    if index == 2 * s.lengths[m]:
        return 0.0
    source = s.placement[slot_of(s, m, index)]
    return p.links[TRANSFER_S, source, s.placement[slot_of(s, m, index + 1)]]


@called
def round_trip_s(p: Instance, s: Schedule, m: int) -> float:
    """Return the time of all tasks and transfers of `m` where nothing makes it wait."""
    total_s = 0.0
    for index in range(2 * s.lengths[m] + 1):
        total_s += duration_s(p, s, m, index) + delay_s(p, s, m, index)
    return total_s


@inlined
def uniform(random: Integers) -> float:
    """Return a number in (0, 1).

    Two multiplicative congruential generators combined (L'Ecuyer, "Efficient and Portable Combined Random Number
    Generators", 1988): period 2.3e18, equal everywhere, and no product overflows 64 bits.
    """
    random[0] = random[0] * 40014 % 2147483563
    random[1] = random[1] * 40692 % 2147483399
    mixed = (random[0] - random[1]) % 2147483562
    return (mixed + 1) / 2147483564.0


@inlined
def below(random: Integers, count: int) -> int:
    """Return a whole number from 0 to `count - 1`."""
    return int(uniform(random) * count)
