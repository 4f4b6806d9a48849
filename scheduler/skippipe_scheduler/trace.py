"""A timeline as a Chrome trace, for Perfetto (https://ui.perfetto.dev)."""

from typing import Any

from skippipe_scheduler.simulate import OPERATION_NAMES, Timeline

MICROSECONDS = 1e6


def to_chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """Return the JSON object of a trace: one process per node, tasks and outgoing transfers as its threads."""
    process = {node: number for number, node in enumerate(timeline.busy_s)}
    events: list[dict[str, Any]] = []
    for node, number in process.items():
        events.append({"ph": "M", "name": "process_name", "pid": number, "args": {"name": node}})
        events.append({"ph": "M", "name": "thread_name", "pid": number, "tid": 0, "args": {"name": "tasks"}})
    for task in timeline.tasks:
        name = f"{OPERATION_NAMES[task.operation]} {task.microbatch}"
        events.append(_complete(name, process[task.node], 0, task.start_s, task.end_s, {"hop": task.hop}))
    for transfer in timeline.transfers:
        name = f"{transfer.microbatch} to {transfer.destination}"
        thread = 1 + process[transfer.destination]
        details = {"hop": transfer.hop, "direction": transfer.direction, "ready_s": transfer.ready_s}
        source = process[transfer.source]
        events.append(_complete(name, source, thread, transfer.start_s, transfer.end_s, details))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


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
