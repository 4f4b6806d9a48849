"""What a run's traces say: its tasks and waits, and how long messages took beside the plan."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import TypeAdapter, ValidationError

from skippipe_scheduler.files import json_lines
from skippipe_scheduler.plan.plan import Operation, Plan, Route
from skippipe_scheduler.plan.recost import NodePair

STOOD_STILL_S = 5e-5
"""A receiver that waited for less found the message there; when it had arrived is not known."""
SHORTEST_S = 1e-3
"""Of a planned transfer: shorter ones are lost in how long processes take to wake up."""


class MeasuredTask(NamedTuple):
    """One measured task; seconds since the iteration began on its node's clock."""

    step: int
    node: str
    operation: str
    microbatch: int
    start_s: float
    end_s: float


class MeasuredWait(NamedTuple):
    """How long a receiver stood still for one message."""

    step: int
    source: str
    destination: str
    microbatch: int
    direction: str
    start_s: float
    end_s: float


_TASK: Final = TypeAdapter(MeasuredTask)
_WAIT: Final = TypeAdapter(MeasuredWait)


@dataclass
class Trace:
    """All tasks and waits of the recorded steps."""

    tasks: list[MeasuredTask] = field(default_factory=list)
    waits: list[MeasuredWait] = field(default_factory=list)


def read_trace(folder: Path) -> Trace:
    """Read the files of all ranks; lines that a crash cut short are left out."""
    return trace_of(line for path in sorted(folder.glob("rank-*.jsonl")) for line in json_lines(path))


def trace_of(lines: Iterable[dict[str, Any] | None]) -> Trace:
    """Return what the lines of such files say, None for a damaged one."""
    trace = Trace()
    for content in lines:
        with suppress(ValidationError):
            if content is not None and content.keys() >= set(MeasuredTask._fields):
                trace.tasks.append(_TASK.validate_python([content[name] for name in MeasuredTask._fields]))
            elif content is not None and content.keys() >= set(MeasuredWait._fields):
                trace.waits.append(_WAIT.validate_python([content[name] for name in MeasuredWait._fields]))
    return trace


def watched_links(plan: Plan) -> Sequence[NodePair]:
    """Return the links that microbatches cross, each once and in rank order, without those of short transfers."""
    transfer_s, rank_of = plan.costs.transfer_s, plan.rank_of
    crossed = set[NodePair]()
    for microbatch in plan.microbatches:
        path = microbatch.whole_path
        for one, other in zip(path, [*path[1:], path[0]], strict=True):
            if one != other and min(transfer_s[one][other], transfer_s[other][one]) >= SHORTEST_S:
                crossed.add((min(one, other, key=rank_of.__getitem__), max(one, other, key=rank_of.__getitem__)))
    return sorted(crossed, key=lambda pair: [rank_of[node] for node in pair])


def link_paces(plan: Plan, given_s: Mapping[NodePair, float], trace: Trace) -> dict[NodePair, float]:
    """Return by what factor messages took longer than `given_s`, equal for both ways of a link.

    A message's time is from the end of the task that made it to the end of the receiver's wait. These are on two
    clocks; in the sum of both ways their difference cancels. Others may have queued before a message, so the shortest
    of an iteration counts.
    """
    ended_s = {(task.step, task.node, task.operation, task.microbatch): task.end_s for task in trace.tasks}
    shortest_s: dict[tuple[int, NodePair], float] = {}
    for wait in trace.waits:
        if not 0 <= wait.microbatch < len(plan.microbatches):  # of another plan
            continue
        operation = _maker(plan.microbatches[wait.microbatch], wait)
        sent_s = ended_s.get((wait.step, wait.source, operation, wait.microbatch))
        if sent_s is None or wait.end_s - wait.start_s < STOOD_STILL_S:
            continue
        key = wait.step, (wait.source, wait.destination)
        shortest_s[key] = min(shortest_s.get(key, float("inf")), wait.end_s - sent_s)
    factors: defaultdict[NodePair, list[float]] = defaultdict(list)
    for (step, (source, destination)), there_s in shortest_s.items():
        back_s = shortest_s.get((step, (destination, source)))
        both_s = given_s[source, destination] + given_s[destination, source]
        if back_s is not None and both_s > 0 and there_s + back_s > 0:
            factors[source, destination].append((there_s + back_s) / both_s)
    return {pair: statistics.median(values) for pair, values in factors.items()}


def _maker(microbatch: Route, wait: MeasuredWait) -> Operation:
    """Return the operation at the source of which a message was the output."""
    if wait.source in microbatch.relays:
        return "RF" if wait.direction == "forward" else "RB"
    if wait.direction == "forward":
        return "F"
    return "L" if wait.source == microbatch.route[0] else "B"
