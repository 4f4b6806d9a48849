"""Messages as fluids: what is under way at the same time shares cards and uplinks fairly.

The shares are max-min fair: no message can have more without one that has no more than it having less (Bertsekas and
Gallager, "Data Networks", 1992, section 6.5.2). That is what long-lived TCP connections of like round-trip times come
to. They change only when a message sets out or has left, and only for those that a full card or uplink joins to it.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from skippipe_scheduler.problem.sharing.contention import Resource


@dataclass(eq=False)
class Flow:
    """One message on its way: what is left of it, and how fast it goes now."""

    left_gbit: float
    most_gbit_per_s: float
    """The bandwidth of its link."""
    used: tuple[Resource, ...]
    gbit_per_s: float = 0.0
    since_s: float = 0.0
    """When `left_gbit` was true; from then on it goes at `gbit_per_s`."""

    @property
    def end_s(self) -> float:
        """When its last byte leaves, if nothing changes."""
        return self.since_s + self.left_gbit / self.gbit_per_s

    def go_on(self, now_s: float, gbit_per_s: float) -> None:
        """Change the speed."""
        self.left_gbit = max(0.0, self.left_gbit - self.gbit_per_s * (now_s - self.since_s))
        self.since_s, self.gbit_per_s = now_s, gbit_per_s


class FluidNetwork:
    """All messages that are under way at a time, each with its fair share.

    Examples:
        >>> network = FluidNetwork({("out", "a"): 1.0})
        >>> slow, fast = Flow(1.0, 0.25, (("out", "a"),)), Flow(1.0, 2.0, (("out", "a"),))
        >>> network.start(slow, 0.0)
        >>> network.start(fast, 0.0)
        >>> slow.gbit_per_s, fast.gbit_per_s
        (0.25, 0.75)
        >>> network.stop(slow, 1.0)
        >>> fast.gbit_per_s, network.next_end_s
        (1.0, 1.25)
    """

    def __init__(self, capacity_gbit_per_s: Mapping[Resource, float]) -> None:
        self._capacity = capacity_gbit_per_s
        self._on: dict[Resource, dict[Flow, None]] = {}
        """The flows on each resource, in the order in which they set out."""
        self._ends: list[tuple[float, int, Flow]] = []
        """When flows end, as a heap; an entry that is not a flow's newest counts no more."""
        self._newest: dict[Flow, int] = {}
        self._entries = 0

    @property
    def next_end_s(self) -> float:
        """When the next flow ends; infinity where none is under way."""
        self._forget_old()
        return self._ends[0][0] if self._ends else math.inf

    @property
    def next_to_end(self) -> Flow:
        """The flow that ends then."""
        self._forget_old()
        return self._ends[0][2]

    def start(self, flow: Flow, now_s: float) -> None:
        """Let a flow set out."""
        flow.since_s = now_s
        for resource in flow.used:
            self._on.setdefault(resource, {})[flow] = None
        self._share([*self._joined(flow)], now_s)

    def stop(self, flow: Flow, now_s: float) -> None:
        """Take a flow away, because it has ended or for another reason."""
        joined = self._joined(flow)
        del joined[flow], self._newest[flow]
        for resource in flow.used:
            del self._on[resource][flow]
        self._share([*joined], now_s)

    def _joined(self, flow: Flow) -> dict[Flow, None]:
        """Return the flow and all whose shares hang together with its own: those on the same crowded resources."""
        found = {flow: None}
        seen: set[Resource] = set()
        for each in (queue := [flow]):
            for resource in each.used:
                if resource not in seen and self._is_crowded(resource):
                    seen.add(resource)
                    added = [other for other in self._on[resource] if other not in found]
                    found.update(dict.fromkeys(added))
                    queue += added
        return found

    def _is_crowded(self, resource: Resource) -> bool:
        """Return whether its flows together could fill more than there is."""
        return sum([flow.most_gbit_per_s for flow in self._on[resource]]) > self._capacity[resource]

    def _share(self, flows: Sequence[Flow], now_s: float) -> None:
        for flow, gbit_per_s in zip(flows, fair_shares(flows, self._capacity), strict=True):
            if gbit_per_s == flow.gbit_per_s:
                continue
            flow.go_on(now_s, gbit_per_s)
            self._entries += 1
            self._newest[flow] = self._entries
            heapq.heappush(self._ends, (flow.end_s, self._entries, flow))

    def _forget_old(self) -> None:
        while self._ends and self._newest.get(self._ends[0][2]) != self._ends[0][1]:
            heapq.heappop(self._ends)


def fair_shares(flows: Sequence[Flow], capacity: Mapping[Resource, float]) -> list[float]:
    """Return the max-min fair Gbit/s of flows that have these resources for themselves.

    By progressive filling: all flows are given more alike, until one has all that its link carries or a resource is
    full; these keep what they have, and the others go on.
    """
    if len(flows) == 1:
        return [min([flows[0].most_gbit_per_s, *(capacity[resource] for resource in flows[0].used)])]
    shares = [0.0] * len(flows)
    on: dict[Resource, list[int]] = {}
    for index, flow in enumerate(flows):
        for resource in flow.used:
            on.setdefault(resource, []).append(index)
    left = {resource: capacity[resource] for resource in on}
    counts = {resource: len(members) for resource, members in on.items()}  # of those that still grow
    growing = dict.fromkeys(range(len(flows)))
    while growing:
        level, fullest = min(
            [(max(0.0, left[resource]) / count, resource) for resource, count in counts.items() if count],
            default=(math.inf, None),
        )
        done = [index for index in growing if flows[index].most_gbit_per_s <= level]
        if not done and fullest is not None:
            done = [index for index in on[fullest] if index in growing]
        for index in done:
            shares[index] = min(level, flows[index].most_gbit_per_s)
            del growing[index]
            for resource in flows[index].used:
                left[resource] -= shares[index]
                counts[resource] -= 1
    return shares
