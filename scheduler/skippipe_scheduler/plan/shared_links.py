"""Transfers with contention "shared": one at a time on each link, those of all links at their fair shares."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from skippipe_scheduler.problem.sharing.capacities import SharedCapacities
from skippipe_scheduler.problem.sharing.fluid import Flow, FluidNetwork

Content = TypeVar("Content")
LinkEnds = tuple[str, str]


@dataclass(frozen=True)
class Carried(Generic[Content]):
    """A message whose last byte has left: what it was, and when its first and last byte did."""

    ends: LinkEnds
    content: Content
    start_s: float
    free_s: float


class SharedLinks(Generic[Content]):
    """Every directed link with what waits for it; what is first there is under way."""

    def __init__(self, capacities: SharedCapacities, gbit_per_s: Mapping[str, Mapping[str, float]]) -> None:
        self._capacities, self._gbit_per_s = capacities, gbit_per_s
        self._network = FluidNetwork(capacities.gbit_per_s)
        self._queues: dict[LinkEnds, deque[tuple[Content, float]]] = {}
        self._under_way: dict[LinkEnds, tuple[Flow, float]] = {}
        self._ends_of: dict[Flow, LinkEnds] = {}

    @property
    def next_end_s(self) -> float:
        """When the next message has left; infinity where none is under way."""
        return self._network.next_end_s

    def offer(self, ends: LinkEnds, content: Content, gbit: float, now_s: float) -> None:
        """Let a message set out as soon as its link is free."""
        self._queues.setdefault(ends, deque()).append((content, gbit))
        if ends not in self._under_way:
            self._set_out(ends, now_s)

    def carry(self) -> Carried[Content]:
        """Take the next message that has left, at `next_end_s`, off its link."""
        now_s, flow = self._network.next_end_s, self._network.next_to_end
        ends = self._ends_of[flow]
        start_s = self._under_way[ends][1]
        content, _ = self._queues[ends].popleft()
        self._clear(ends, now_s)
        if self._queues[ends]:
            self._set_out(ends, now_s)
        return Carried(ends, content, start_s, now_s)

    def cut_off(self, node: str, now_s: float) -> None:
        """Drop all that is on a link to or from `node`, or waits for one."""
        for ends in [ends for ends in self._queues if node in ends]:
            self._queues[ends].clear()
            if ends in self._under_way:
                self._clear(ends, now_s)

    def _set_out(self, ends: LinkEnds, now_s: float) -> None:
        source, destination = ends
        _, gbit = self._queues[ends][0]
        flow = Flow(gbit, self._gbit_per_s[source][destination], self._capacities.used(*ends))
        self._under_way[ends], self._ends_of[flow] = (flow, now_s), ends
        self._network.start(flow, now_s)

    def _clear(self, ends: LinkEnds, now_s: float) -> None:
        flow, _ = self._under_way.pop(ends)
        del self._ends_of[flow]
        self._network.stop(flow, now_s)
