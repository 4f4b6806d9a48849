"""What a node did when: simulated (from a timeline) and measured (from a trace) in one form."""

from collections.abc import Iterable
from typing import NamedTuple

from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.simulate import Timeline

REDUCE = "REDUCE"


class ChartSpan(NamedTuple):
    """One interval of a node: a plan's operation of a microbatch, or REDUCE (microbatch -1).

    Seconds count from the iteration's start.
    """

    node: str
    operation: str
    microbatch: int
    start_s: float
    end_s: float


def timeline_spans(plan: Plan, timeline: Timeline) -> list[ChartSpan]:
    """Return all tasks of a simulated iteration, and each stage's reduction on every one of its replicas."""
    spans = [ChartSpan(task.node, task.operation, task.microbatch, task.start_s, task.end_s) for task in timeline.tasks]
    for reduction in timeline.reductions:
        if reduction.end_s > reduction.start_s:
            spans += [
                ChartSpan(node, REDUCE, -1, reduction.start_s, reduction.end_s)
                for node in plan.stages[reduction.stage].nodes
            ]
    return spans


def end_s(spans: Iterable[ChartSpan]) -> float:
    """Return the end of the last span in seconds, 0 where there is none."""
    return max((span.end_s for span in spans), default=0.0)
