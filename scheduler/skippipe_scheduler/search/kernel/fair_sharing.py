"""Transfers that share cards and uplinks, compiled: the same as `plan.shared_links` and `problem.sharing.fluid`.

A transfer goes by its microbatch, which never has two. Of those that are ready for the same link one is under way, and
the others stand behind each other. Those that are under way form a heap, the one that ends next on top.
"""

import math

from skippipe_scheduler.search.kernel.arrays import (
    BEHIND,
    CAPACITY,
    COUNT,
    CROWDED,
    DEMAND,
    END_S,
    FIRST,
    FIRST_USED,
    GBIT_PER_S,
    GROWING,
    JOINED,
    LAST,
    LEFT_GBIT,
    MOST_GBIT_PER_S,
    NOBODY,
    PLACE,
    REST,
    SEARCHES,
    SEEN,
    SEEN_BY,
    SHARE,
    SINCE_S,
    SPEED,
    TASK,
    UNDER_WAY,
    Floats,
    Integers,
    Sharing,
)
from skippipe_scheduler.search.kernel.jit import called, inlined


@called
def clear(sharing: Sharing) -> None:
    """Take all transfers away."""
    sharing.state[COUNT] = 0
    for resource in range(sharing.resources.shape[1]):
        sharing.resources[DEMAND, resource] = 0.0
        sharing.counts[CROWDED, resource] = 0
    for source in range(sharing.queues.shape[1]):
        for slot in range(sharing.queues.shape[2]):
            sharing.queues[FIRST, source, slot] = NOBODY


@inlined
def next_end_s(sharing: Sharing) -> float:
    """Return when the next transfer has left; infinity where none is under way."""
    if sharing.state[COUNT] == 0:
        return math.inf
    return sharing.transfers[END_S, sharing.numbers[UNDER_WAY, 0]]


@inlined
def next_to_end(sharing: Sharing) -> int:
    """Return the task for which it is."""
    return sharing.numbers[TASK, sharing.numbers[UNDER_WAY, 0]]


@called
def offer(sharing: Sharing, m: int, task: int, source: int, slot: int, gbit: float) -> bool:
    """Put the transfer to `task` of `m` behind those for the same link; return whether it is the first there."""
    queues, numbers = sharing.queues, sharing.numbers
    numbers[TASK, m] = task
    numbers[BEHIND, m] = NOBODY
    sharing.transfers[LEFT_GBIT, m] = gbit
    first = queues[FIRST, source, slot] == NOBODY
    if first:
        queues[FIRST, source, slot] = m
    else:
        numbers[BEHIND, queues[LAST, source, slot]] = m
    queues[LAST, source, slot] = m
    return first


@called
def take_off(sharing: Sharing, m: int, source: int, slot: int) -> int:
    """Take the transfer of `m`, which has left, off its link; return who is first there now, or `NOBODY`."""
    sharing.queues[FIRST, source, slot] = sharing.numbers[BEHIND, m]
    return sharing.numbers[BEHIND, m]


@called
def set_out(sharing: Sharing, links: Floats, m: int, here: int, there: int, now_s: float) -> None:
    """Let the first of its link be under way, from node to node."""
    transfers, numbers = sharing.transfers, sharing.numbers
    transfers[MOST_GBIT_PER_S, m] = links[GBIT_PER_S, here, there]
    transfers[SPEED, m] = 0.0
    transfers[SINCE_S, m] = now_s
    transfers[END_S, m] = math.inf
    for number in range(numbers.shape[0] - FIRST_USED):
        resource = used_resource(sharing, here, there, number)
        numbers[FIRST_USED + number, m] = resource
        if resource != NOBODY:
            sharing.resources[DEMAND, resource] += transfers[MOST_GBIT_PER_S, m]
            sharing.counts[CROWDED, resource] += 1
    place = sharing.state[COUNT]
    sharing.state[COUNT] = place + 1
    numbers[UNDER_WAY, place] = m
    numbers[PLACE, m] = place
    _share(sharing, _join(sharing, m), now_s)


@called
def stop(sharing: Sharing, m: int, now_s: float) -> None:
    """Take the transfer of `m` away, so that others have its share."""
    numbers = sharing.numbers
    joined = _join(sharing, m)
    for number in range(numbers.shape[0] - FIRST_USED):
        resource = numbers[FIRST_USED + number, m]
        if resource != NOBODY:
            sharing.counts[CROWDED, resource] -= 1
            sharing.resources[DEMAND, resource] -= sharing.transfers[MOST_GBIT_PER_S, m]
            if sharing.counts[CROWDED, resource] == 0:
                sharing.resources[DEMAND, resource] = 0.0  # without what rounding has left
    # The last of the heap takes the place of `m`, which is the first that was joined.
    last = sharing.state[COUNT] - 1
    sharing.state[COUNT] = last
    place = numbers[PLACE, m]
    if place < last:
        numbers[UNDER_WAY, place] = numbers[UNDER_WAY, last]
        numbers[PLACE, numbers[UNDER_WAY, place]] = place
        _sift(sharing, place)
    numbers[JOINED, 0] = numbers[JOINED, joined - 1]
    _share(sharing, joined - 1, now_s)


@inlined
def used_resource(sharing: Sharing, here: int, there: int, number: int) -> int:
    """Return a resource that limits messages from node to node, by its number among those that might; or `NOBODY`."""
    nodes, deepest = sharing.uplinks_of.shape
    if number == 0:
        resource = here
    elif number == 1:
        resource = nodes + there
    else:
        leaves = number < 2 + deepest
        end = here if leaves else there
        uplink = sharing.uplinks_of[end, (number - 2) % deepest]
        if uplink == NOBODY or _is_behind(sharing.uplinks_of, there if leaves else here, uplink):
            return NOBODY
        resource = 2 * nodes + 2 * uplink + (0 if leaves else 1)
    return resource if sharing.resources[CAPACITY, resource] < math.inf else NOBODY


@inlined
def _is_behind(uplinks_of: Integers, node: int, uplink: int) -> bool:
    found = False
    for number in range(uplinks_of.shape[1]):
        found |= uplinks_of[node, number] == uplink
    return found


@called
def _join(sharing: Sharing, m: int) -> int:
    """List `m`, then all whose shares hang together with its own; return how many they are."""
    numbers, resources, counts = sharing.numbers, sharing.resources, sharing.counts
    sharing.state[SEARCHES] += 1
    search = sharing.state[SEARCHES]
    numbers[JOINED, 0] = m
    numbers[SEEN, m] = search
    joined = 1
    done = 0
    while done < joined:
        each = numbers[JOINED, done]
        done += 1
        for number in range(FIRST_USED, numbers.shape[0]):
            resource = numbers[number, each]
            if resource == NOBODY or counts[SEEN_BY, resource] == search:
                continue
            if resources[DEMAND, resource] <= resources[CAPACITY, resource]:
                continue
            counts[SEEN_BY, resource] = search
            for place in range(sharing.state[COUNT]):
                other = numbers[UNDER_WAY, place]
                if numbers[SEEN, other] != search and _uses(numbers, other, resource):
                    numbers[SEEN, other] = search
                    numbers[JOINED, joined] = other
                    joined += 1
    return joined


@inlined
def _uses(numbers: Integers, m: int, resource: int) -> bool:
    found = False
    for number in range(FIRST_USED, numbers.shape[0]):
        found |= numbers[number, m] == resource
    return found


@called
def _share(sharing: Sharing, joined: int, now_s: float) -> None:
    """Give the joined their max-min fair shares from now on."""
    transfers, numbers = sharing.transfers, sharing.numbers
    _fill(sharing, joined)
    for index in range(joined):
        m = numbers[JOINED, index]
        if transfers[SHARE, m] == transfers[SPEED, m]:
            continue
        gone_gbit = transfers[SPEED, m] * (now_s - transfers[SINCE_S, m])
        transfers[LEFT_GBIT, m] = max(0.0, transfers[LEFT_GBIT, m] - gone_gbit)
        transfers[SINCE_S, m] = now_s
        transfers[SPEED, m] = transfers[SHARE, m]
        transfers[END_S, m] = now_s + transfers[LEFT_GBIT, m] / transfers[SPEED, m]
        _sift(sharing, numbers[PLACE, m])


@called
def _fill(sharing: Sharing, joined: int) -> None:
    """Write the shares of the joined by progressive filling; only what was seen to be crowded can limit them."""
    transfers, numbers, resources, counts = sharing.transfers, sharing.numbers, sharing.resources, sharing.counts
    search = sharing.state[SEARCHES]
    for index in range(joined):
        for number in range(FIRST_USED, numbers.shape[0]):
            resource = numbers[number, numbers[JOINED, index]]
            if resource != NOBODY:
                resources[REST, resource] = resources[CAPACITY, resource]
                counts[GROWING, resource] = 0
    for index in range(joined):
        for number in range(FIRST_USED, numbers.shape[0]):
            resource = numbers[number, numbers[JOINED, index]]
            if resource != NOBODY:
                counts[GROWING, resource] += 1
    # The joined from `done` on still grow.
    done = 0
    while done < joined:
        level = math.inf
        fullest = NOBODY
        for index in range(done, joined):
            for number in range(FIRST_USED, numbers.shape[0]):
                resource = numbers[number, numbers[JOINED, index]]
                if resource == NOBODY or counts[SEEN_BY, resource] != search:
                    continue
                each = max(0.0, resources[REST, resource]) / counts[GROWING, resource]
                if each < level:
                    level = each
                    fullest = resource
        before = done
        for index in range(done, joined):
            if transfers[MOST_GBIT_PER_S, numbers[JOINED, index]] <= level:
                _keep(sharing, index, done, level)
                done += 1
        if done == before:
            for index in range(done, joined):
                if _uses(numbers, numbers[JOINED, index], fullest):
                    _keep(sharing, index, done, level)
                    done += 1


@inlined
def _keep(sharing: Sharing, index: int, done: int, level: float) -> None:
    """The joined at `index` grows no more; it comes to `done`."""
    numbers = sharing.numbers
    m = numbers[JOINED, index]
    numbers[JOINED, index] = numbers[JOINED, done]
    numbers[JOINED, done] = m
    share = min(level, sharing.transfers[MOST_GBIT_PER_S, m])
    sharing.transfers[SHARE, m] = share
    for number in range(FIRST_USED, numbers.shape[0]):
        resource = numbers[number, m]
        if resource != NOBODY:
            sharing.resources[REST, resource] -= share
            sharing.counts[GROWING, resource] -= 1


@called
def _sift(sharing: Sharing, place: int) -> None:
    """Move a transfer under way up or down, to where its end belongs."""
    numbers, transfers = sharing.numbers, sharing.transfers
    m = numbers[UNDER_WAY, place]
    end_s = transfers[END_S, m]
    while place > 0:
        parent = numbers[UNDER_WAY, (place - 1) // 2]
        if transfers[END_S, parent] <= end_s:
            break
        numbers[UNDER_WAY, place] = parent
        numbers[PLACE, parent] = place
        place = (place - 1) // 2
    count = sharing.state[COUNT]
    while 2 * place + 1 < count:
        below = 2 * place + 1
        if below + 1 < count:
            left = transfers[END_S, numbers[UNDER_WAY, below]]
            below += transfers[END_S, numbers[UNDER_WAY, below + 1]] < left
        child = numbers[UNDER_WAY, below]
        if transfers[END_S, child] >= end_s:
            break
        numbers[UNDER_WAY, place] = child
        numbers[PLACE, child] = place
        place = below
    numbers[UNDER_WAY, place] = m
    numbers[PLACE, m] = place
