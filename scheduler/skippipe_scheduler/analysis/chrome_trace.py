"""A timeline as a Chrome trace, for Perfetto (https://ui.perfetto.dev)."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from skippipe_scheduler.analysis.usage import held_over_time
from skippipe_scheduler.files import write_atomically
from skippipe_scheduler.plan.simulate import OPERATION_NAMES, TaskSpan, Timeline, TransferSpan

MICROSECONDS = 1e6
TASKS = 0
"""Thread of a node's tasks; its outgoing transfers follow."""


def to_chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """Return the JSON object of a trace.

    A process per node holds its tasks, its outgoing transfers (a thread per link, more where they overlap) and a
    counter of the microbatches it holds; one more process holds the gradient reductions, a thread per stage.
    """
    process = {node: number for number, node in enumerate(timeline.busy_s)}
    events: list[dict[str, Any]] = []
    for node, number in process.items():
        events += [_name("process_name", number, TASKS, node), _name("thread_name", number, TASKS, "tasks")]
    for task in timeline.tasks:
        events.append(_task(process[task.node], task))
    for task in timeline.cut:
        events.append(_task(process[task.node], task, " (cut off)"))
    events += [*_transfers(timeline.transfers, process), *_held(timeline.tasks, process)]
    return {"traceEvents": [*events, *_reductions(timeline, len(process))], "displayTimeUnit": "ms"}


def save_chrome_trace(path: str | Path, timeline: Timeline) -> None:
    """Write a timeline as a Chrome trace, which https://ui.perfetto.dev and chrome://tracing show.

    Each node is a process of the trace, with its tasks, its outgoing transfers, and how many microbatches it holds.

    Args:
        path: The JSON file to write, whole or not at all.
        timeline: What happens in one iteration.

    Raises:
        SkipPipeError: The file cannot be written.

    Examples:
        >>> save_chrome_trace(Path("trace.json"), timeline)
        >>> Path("trace.json").read_text()[:16]
        '{"traceEvents": '
    """
    write_atomically(Path(path), json.dumps(to_chrome_trace(timeline)))


def _task(process: int, task: TaskSpan, remark: str = "") -> dict[str, Any]:
    name = f"{OPERATION_NAMES[task.operation]} {task.microbatch}{remark}"
    return _complete(name, process, TASKS, task.start_s, task.end_s, {"microbatch": task.microbatch, "hop": task.hop})


def _transfers(transfers: Iterable[TransferSpan], process: dict[str, int]) -> list[dict[str, Any]]:
    """Return the transfers, each in the first lane of its link that is free: bars of one thread must not overlap."""
    events: list[dict[str, Any]] = []
    lanes: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    threads: dict[str, int] = defaultdict(int)
    for span in sorted(transfers, key=lambda span: span.start_s):
        of_link = lanes[span.source, span.destination]
        lane = next((index for index, (_, end_s) in enumerate(of_link) if end_s <= span.start_s), len(of_link))
        if lane == len(of_link):
            threads[span.source] += 1
            of_link.append((threads[span.source], 0.0))
            events.append(
                _name("thread_name", process[span.source], threads[span.source], f"transfers to {span.destination}")
            )
        thread = of_link[lane][0]
        of_link[lane] = (thread, span.end_s)
        details = {"hop": span.hop, "direction": span.direction, "queued_s": span.start_s - span.ready_s}
        name = f"{span.microbatch} to {span.destination}"
        events.append(_complete(name, process[span.source], thread, span.start_s, span.end_s, details))
    return events


def _held(tasks: Iterable[TaskSpan], process: dict[str, int]) -> list[dict[str, Any]]:
    of_node: dict[str, list[TaskSpan]] = defaultdict(list)
    for task in tasks:
        of_node[task.node].append(task)
    return [
        {
            "ph": "C",
            "name": "microbatches held",
            "pid": process[node],
            "ts": second * MICROSECONDS,
            "args": {"held": held},
        }
        for node, own in of_node.items()
        for second, held in held_over_time(own)
    ]


def _reductions(timeline: Timeline, process: int) -> list[dict[str, Any]]:
    spans = [span for span in timeline.reductions if span.end_s > span.start_s]
    if not spans:
        return []
    events = [_name("process_name", process, 0, "gradient reductions")]
    for span in spans:
        events.append(_name("thread_name", process, span.stage, f"stage {span.stage}"))
        events.append(_complete(f"reduction of stage {span.stage}", process, span.stage, span.start_s, span.end_s, {}))
    return events


def _name(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}


def _complete(
    name: str, process: int, thread: int, start_s: float, end_s: float, details: dict[str, Any]
) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": name,
        "pid": process,
        "tid": thread,
        "ts": start_s * MICROSECONDS,
        "dur": (end_s - start_s) * MICROSECONDS,
        "args": details,
    }
