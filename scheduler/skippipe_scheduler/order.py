"""Order by insertion: an exact timeline per slot into which whole microbatches are put at the earliest
feasible place.

Inserting all tasks of a microbatch at once, instead of dispatching task by task, never fills the memory of
nodes that then wait for each other: the tasks of the timeline always have a global order, so no plan made
here can deadlock.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence

from skippipe_scheduler.slots import SlotCosts, SlotRoute

_ATTEMPTS = 80
_EPSILON_S = 1e-9


class Timeline:
    """Busy and held intervals of every slot, and the start of every task of every microbatch that is in."""

    def __init__(self, costs: SlotCosts, num_microbatches: int) -> None:
        slots = range(len(costs.placement))
        self.costs = costs
        self.busy_from: list[list[float]] = [[] for _ in slots]
        self.busy_to: list[list[float]] = [[] for _ in slots]
        self.held: list[list[tuple[float, float]]] = [[] for _ in slots]
        self.starts: list[list[float]] = [[] for _ in range(num_microbatches)]

    def insert(self, microbatch: int, route: SlotRoute, wait_s: float) -> None:
        """Put all tasks of `microbatch` at the earliest place where no task waits more than `wait_s` for
        its node.
        """
        starts = self._earliest(route, wait_s)
        chain = self.costs.chain(route)
        length = len(route)
        for start_s, slot, duration_s in zip(starts, chain.slots, chain.durations_s, strict=True):
            index = bisect_right(self.busy_from[slot], start_s)
            self.busy_from[slot].insert(index, start_s)
            self.busy_to[slot].insert(index, start_s + duration_s + self.costs.overhead_s)
        for hop, slot in enumerate(route):
            last = 2 * length - hop
            insort(self.held[slot], (starts[hop], starts[last] + chain.durations_s[last]))
        self.starts[microbatch] = starts

    def without(self, routes: Sequence[SlotRoute], removed: Iterable[int]) -> "Timeline":
        """Return a copy from which the tasks of the `removed` microbatches are gone, everything else in its
        place.
        """
        copy = Timeline.__new__(Timeline)
        copy.costs = self.costs
        copy.busy_from = [list(row) for row in self.busy_from]
        copy.busy_to = [list(row) for row in self.busy_to]
        copy.held = [list(row) for row in self.held]
        copy.starts = list(self.starts)
        for microbatch in removed:
            starts, chain = self.starts[microbatch], self.costs.chain(routes[microbatch])
            for index, (start_s, slot) in enumerate(zip(starts, chain.slots, strict=True)):
                end_s = start_s + chain.durations_s[index]
                place = bisect_left(copy.busy_from[slot], start_s)
                while copy.busy_to[slot][place] != end_s + self.costs.overhead_s:
                    place += 1
                del copy.busy_from[slot][place], copy.busy_to[slot][place]
            for hop, slot in enumerate(routes[microbatch]):
                last = 2 * len(routes[microbatch]) - hop
                copy.held[slot].remove((starts[hop], starts[last] + chain.durations_s[last]))
            copy.starts[microbatch] = []
        return copy

    def _earliest(self, route: SlotRoute, wait_s: float) -> list[float]:
        release = [0.0] * len(route)
        for _ in range(_ATTEMPTS):
            starts, excess_s = self._place(route, release, wait_s)
            blocked = False
            if excess_s > _EPSILON_S:
                release[0], blocked = starts[0] + excess_s, True
            durations = self.costs.chain(route).durations_s
            for hop, slot in enumerate(route):
                last = 2 * len(route) - hop
                free_s = self._room_from(slot, starts[hop], starts[last] + durations[last])
                if free_s > starts[hop]:
                    release[hop], blocked = max(release[hop], free_s), True
            if not blocked:
                return starts
        release = [max((ends[-1] for ends in self.busy_to if ends), default=0.0)] * len(route)
        return self._place(route, release, wait_s)[0]

    def _place(self, route: SlotRoute, release: Sequence[float], wait_s: float) -> tuple[list[float], float]:
        """Return greedy starts of the chain and by how much the longest wait exceeds `wait_s`."""
        chain, overhead_s, length = self.costs.chain(route), self.costs.overhead_s, len(route)
        durations_s, delays_s, previous = chain.durations_s, chain.delays_s, chain.previous
        starts: list[float] = []
        now_s, excess_s = 0.0, 0.0
        for index, slot in enumerate(chain.slots):
            arrival_s = now_s
            if index < length:
                now_s = max(now_s, release[index])
            else:
                before = previous[index]
                now_s = max(now_s, starts[before] + durations_s[before] + overhead_s)
            taken_s = durations_s[index] + overhead_s
            busy_from, busy_to = self.busy_from[slot], self.busy_to[slot]
            place = bisect_right(busy_from, now_s)
            if place and busy_to[place - 1] > now_s:
                now_s = busy_to[place - 1]
            while place < len(busy_from) and busy_from[place] < now_s + taken_s - _EPSILON_S:
                now_s = max(now_s, busy_to[place])
                place += 1
            if index:
                excess_s = max(excess_s, now_s - arrival_s - wait_s)
            starts.append(now_s)
            now_s += durations_s[index] + delays_s[index]
        return starts, excess_s

    def _room_from(self, slot: int, first_s: float, last_s: float) -> float:
        """Return `first_s` if the slot can hold one more over the whole interval, else when to try again."""
        memory = self.costs.memory[slot]
        near = [item for item in self.held[slot] if item[0] < last_s and item[1] > first_s]
        if len(near) < memory:
            return first_s
        for point_s, _ in reversed([(first_s, 0.0), *near]):
            at_s = max(point_s, first_s)
            ends = [end_s for start_s, end_s in near if start_s <= at_s < end_s]
            if len(ends) >= memory:
                return min(ends)
        return first_s


def retime(costs: SlotCosts, routes: Sequence[SlotRoute], starts: Sequence[Sequence[float]]) -> Timeline:
    """Return the timeline in which every task starts as early as its order in `starts` allows.

    Microbatches with no starts are left out. `costs` need not be those that `starts` were made with.
    """
    timeline = Timeline(costs, len(routes))
    chains = [costs.chain(route) for route in routes]
    overhead_s, busy_to, new = costs.overhead_s, timeline.busy_to, timeline.starts
    ready = [0.0] * len(routes)
    free = [0.0] * len(busy_to)
    for _, index, microbatch in task_sequence(starts):
        chain = chains[microbatch]
        slot = chain.slots[index]
        start_s = ready[microbatch]
        if free[slot] > start_s:
            start_s = free[slot]
        end_s = start_s + chain.durations_s[index]
        free[slot] = end_s + overhead_s
        timeline.busy_from[slot].append(start_s)
        busy_to[slot].append(end_s + overhead_s)
        new[microbatch].append(start_s)
        ready[microbatch] = end_s + chain.delays_s[index]
    for row, route, chain in zip(new, routes, chains, strict=True):
        if row:
            last = 2 * len(route)
            for hop, slot in enumerate(route):
                timeline.held[slot].append((row[hop], row[last - hop] + chain.durations_s[last - hop]))
    for held in timeline.held:
        held.sort()
    return timeline


def task_sequence(starts: Sequence[Sequence[float]]) -> list[tuple[float, int, int]]:
    """Return (start in seconds, index in its chain, microbatch) of every task in a global order free of
    cycles.
    """
    return sorted(
        [(start_s, index, microbatch) for microbatch, row in enumerate(starts) for index, start_s in enumerate(row)]
    )


def fits_memory(timeline: Timeline) -> bool:
    """Return whether no slot ever holds more than its memory."""
    for slot, held in enumerate(timeline.held):
        memory = timeline.costs.memory[slot]
        ends = sorted(end_s for _, end_s in held)
        for index, (start_s, _) in enumerate(held[memory:]):
            if start_s < ends[index] - _EPSILON_S:
                return False
    return True


def build(costs: SlotCosts, routes: Sequence[SlotRoute], sequence: Iterable[int], wait_s: float) -> Timeline:
    """Insert the microbatches in the given sequence into an empty timeline."""
    timeline = Timeline(costs, len(routes))
    for microbatch in sequence:
        timeline.insert(microbatch, routes[microbatch], wait_s)
    return retime(costs, routes, timeline.starts)
