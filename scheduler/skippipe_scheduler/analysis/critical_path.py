"""The critical path: the chain of work and waiting that makes an iteration as long as it is.

Walked back from the end: every task and transfer started when the last of the things it waited for was there, and
that one is the segment before it. The segments touch, so that their lengths add up to the iteration time.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from skippipe_scheduler.plan.plan import Operation, Plan
from skippipe_scheduler.plan.simulate import (
    OPERATION_NAMES,
    OperationName,
    ReductionSpan,
    TaskSpan,
    Timeline,
    TransferSpan,
    inputs,
    simulate,
)
from skippipe_scheduler.problem.sharing.contention import Contention, Resource, occupied_resources

SegmentKind = OperationName | Literal["overhead", "transfer", "queueing", "reduction"]
Reason = Literal["start", "input", "node", "link", "reduction"]
REASONS: dict[Reason, str] = {
    "start": "it is the first",
    "input": "it waits for its input",
    "node": "it waits for its node",
    "link": "it waits for its link",
    "reduction": "it waits for the last task of its stage",
}


class PathSegment(NamedTuple):
    """One link of the chain, on `node` or from there to `destination`; `reason` is why it could not be earlier.

    A segment of `queueing` is the time for which the transfer of `microbatch` keeps the link (or the card) from the
    next one. A reduction has microbatch -1.
    """

    kind: SegmentKind
    node: str
    destination: str | None
    microbatch: int
    start_s: float
    end_s: float
    reason: Reason

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.end_s - self.start_s

    @property
    def place(self) -> str:
        """The node, or the link in words."""
        return self.node if self.destination is None else f"{self.node} to {self.destination}"


@dataclass(frozen=True)
class CriticalPath:
    """Segments from the start of the iteration to its end; each begins where the one before it ends.

    Examples:
        >>> path = critical_path(plan)
        >>> path.segments[0].kind, path.segments[0].start_s, path.segments[0].reason
        ('forward', 0.0, 'start')
        >>> abs(sum(path.by_kind.values()) - plan.predicted.iteration_s) < 1e-9
        True
    """

    segments: tuple[PathSegment, ...]
    """In order of time."""

    @cached_property
    def iteration_s(self) -> float:
        """End of the last segment: the iteration time."""
        return self.segments[-1].end_s if self.segments else 0.0

    @cached_property
    def by_kind(self) -> dict[str, float]:
        """Seconds of each kind, the largest first."""
        return _totals(self.segments, lambda segment: segment.kind)

    @cached_property
    def by_place(self) -> dict[str, float]:
        """Seconds on each node and on each link ("a to b"), the largest first."""
        return _totals(self.segments, lambda segment: segment.place)

    def by_region(self, plan: Plan) -> dict[str, float]:
        """Return seconds in each region and between regions ("x to y"), the largest first; empty without regions."""
        if plan.regions is None:
            return {}
        region = dict(zip(plan.nodes, plan.regions, strict=True))

        def name(segment: PathSegment) -> str:
            here, there = region[segment.node], region[segment.destination or segment.node]
            return here if here == there else f"{here} to {there}"

        return _totals(self.segments, name)


def critical_path(plan: Plan, timeline: Timeline | None = None) -> CriticalPath:
    """Find the chain of work and waiting that makes an iteration as long as it is.

    Where two causes end at the same time, an input goes before the node's order and an idle link before a busy one.

    Args:
        plan: The plan.
        timeline: A complete simulation of it; the exact one where not given.

    Returns:
        The segments of the chain, whose seconds add up to the iteration time.

    Raises:
        DeadlockError: The order of the plan makes nodes wait for each other.

    Examples:
        >>> path = critical_path(plan)
        >>> path.iteration_s == plan.predicted.iteration_s
        True
    """
    return CriticalPath(_PathTracer(plan, timeline or simulate(plan)).trace())


def _totals(segments: tuple[PathSegment, ...], name: Callable[[PathSegment], str]) -> dict[str, float]:
    total_s: dict[str, float] = defaultdict(float)
    for segment in segments:
        total_s[name(segment)] += segment.duration_s
    return dict(sorted(total_s.items(), key=lambda item: (-item[1], item[0])))


class _PathTracer:
    """What came before each task and each transfer."""

    def __init__(self, plan: Plan, timeline: Timeline) -> None:
        self.plan, self.timeline = plan, timeline
        self.task: dict[tuple[str, Operation, int], TaskSpan] = {}
        self.before_on_node: dict[TaskSpan, TaskSpan] = {}
        last: dict[str, TaskSpan] = {}
        for span in timeline.tasks:
            self.task[span.node, span.operation, span.microbatch] = span
            if span.node in last:
                self.before_on_node[span] = last[span.node]
            last[span.node] = span
        self.last = last
        self.arrival = inputs(timeline)
        self.before_on_link = _queues(timeline, plan.costs.contention)
        self.segments: list[PathSegment] = []

    def trace(self) -> tuple[PathSegment, ...]:
        """Return the segments in order of time."""
        span: TaskSpan | TransferSpan | None = self._end()
        while span is not None:
            span = self._task(span) if isinstance(span, TaskSpan) else self._transfer(span)
        return tuple(reversed(self.segments))

    def _end(self) -> TaskSpan | None:
        """Add the reduction that ends the iteration, if one does, and return the task before it."""
        if not self.timeline.tasks:
            return None
        final = max(self.timeline.tasks, key=lambda span: span.end_s)
        reduction = max(self.timeline.reductions, key=lambda span: span.end_s, default=None)
        if reduction is None or reduction.end_s <= final.end_s:
            return final
        return self._reduction(reduction)

    def _reduction(self, span: ReductionSpan) -> TaskSpan | None:
        ends = [self.last[node] for node in self.plan.stages[span.stage].nodes if node in self.last]
        task = max(ends, key=lambda span: span.end_s, default=None)
        node = self.plan.stages[span.stage].nodes[0] if task is None else task.node
        reason: Reason = "start" if task is None else "reduction"
        self.segments.append(PathSegment("reduction", node, None, -1, span.start_s, span.end_s, reason))
        return task

    def _task(self, span: TaskSpan) -> TaskSpan | TransferSpan | None:
        """Add a task and, where it waited for its node, the node's overhead; return what it waited for."""
        arrival = self.arrival.get((span.node, span.operation, span.microbatch))
        before = self.before_on_node.get(span)
        came_last = arrival if arrival is not None and arrival.end_s >= span.start_s else before
        reason: Reason = "start" if came_last is None else "input" if came_last is arrival else "node"
        kind = OPERATION_NAMES[span.operation]
        self.segments.append(PathSegment(kind, span.node, None, span.microbatch, span.start_s, span.end_s, reason))
        if isinstance(came_last, TaskSpan) and came_last.end_s < span.start_s:
            self.segments.append(
                PathSegment("overhead", span.node, None, came_last.microbatch, came_last.end_s, span.start_s, "node")
            )
        return came_last

    def _transfer(self, span: TransferSpan) -> TaskSpan | TransferSpan:
        """Add a transfer and all that kept its link busy before; return the task that the first one waited for."""
        kind: SegmentKind = "transfer"
        end_s = span.end_s
        while True:
            waited = span.start_s > span.ready_s
            reason: Reason = "link" if waited else "input"
            self.segments.append(
                PathSegment(kind, span.source, span.destination, span.microbatch, span.start_s, end_s, reason)
            )
            if not waited:
                return self.task[span.source, span.maker, span.microbatch]
            kind, end_s = "queueing", span.start_s
            span = self.before_on_link[span]


def _queues(timeline: Timeline, contention: Contention) -> dict[TransferSpan, TransferSpan]:
    """Return for every transfer the one that was the last to free what it occupies: its link or its network cards."""
    before: dict[TransferSpan, TransferSpan] = {}
    newest: dict[Resource, TransferSpan] = {}
    for span in sorted(timeline.transfers, key=lambda span: (span.start_s, span.free_s)):
        occupied = occupied_resources(contention, span.source, span.destination)
        earlier = [newest[resource] for resource in occupied if resource in newest]
        if earlier:
            before[span] = max(earlier, key=lambda span: span.free_s)
        newest.update(dict.fromkeys(occupied, span))
    return before
