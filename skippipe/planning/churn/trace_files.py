"""Failure traces from files: a simple CSV of a plan's own nodes, and the formats of public traces of other machines."""

import csv
import math
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from skippipe.errors import InputError
from skippipe.planning.churn.failure_trace import SECONDS_PER_HOUR, FailureTrace, make_trace
from skippipe.planning.churn.machine_counts import MachineChange, counts_as_changes, on_nodes
from skippipe_scheduler.files import Count, Seconds, describe, parse_json, read_text
from skippipe_scheduler.plan.plan import Plan

HEADER = ("time_s", "node", "event")
EVENTS = {"lost": False, "back": True}
END = "end"
MILLI = 1000.0
TraceRow = tuple[str, tuple[str, ...]]
"""Where a row is, and its cells."""
FORMATS = (
    "rows of time_s,node,lost|back|end; Bamboo's milliseconds,add|remove,node; seconds,machines; "
    'date, time, machines; Sailor\'s [{"Time": s, "GPUs": n}]; CheckFree\'s {"node": [iteration, ...]}'
)


class _Sample(BaseModel):
    """How many machines were there at one time, as Sailor writes it."""

    time_s: Annotated[Seconds, Field(alias="Time")]
    machines: Annotated[Count, Field(alias="GPUs")]


_SAMPLES = TypeAdapter(list[_Sample])
_ITERATIONS = TypeAdapter(dict[int, list[Count]])


def load_trace(
    path: Path, plan: Plan, *, rejoin_s: float = 0.0, duration_s: float | None = None, seed: int = 0
) -> FailureTrace:
    """Read a trace for the nodes of a plan; the format follows from the content.

    Args:
        path: The file. A simple CSV (`time_s,node,event` with lost, back, and end without a node) names the plan's
            nodes. Others tell of machines: `on_nodes` says what becomes of these.
        plan: The plan.
        rejoin_s: When a node is back whose loss alone the file has (CheckFree), in seconds.
        duration_s: Where the trace ends, in seconds; where the file says, or with its last event, if not given.
        seed: Chooses the nodes that stand for the machines.

    Raises:
        InputError: The file cannot be read, or something in it is wrong; the message names the line or the node.
    """
    text = read_text(path, InputError)
    if text.lstrip()[:1] in ("[", "{"):
        return _from_json(text, path, plan, rejoin_s, duration_s, seed)
    cells = csv.reader(text.splitlines(), skipinitialspace=True)
    rows = [(f"{path}:{cells.line_num}", tuple(cell.strip() for cell in row)) for row in cells]
    rows = [(place, row) for place, row in rows if any(row) and row != HEADER]
    kinds = {row[1][-1] in (*EVENTS, END) for row in rows}
    if kinds == {True}:
        return _own_nodes(rows, path, plan, duration_s)
    return on_nodes(_machines(rows, path), plan, str(path), duration_s=duration_s, seed=seed)


def _own_nodes(rows: Sequence[TraceRow], path: Path, plan: Plan, duration_s: float | None) -> FailureTrace:
    """Return the trace of rows time_s,node,event."""
    events, end_s = [], None
    for place, cells in rows:
        time_s = _number(cells, 0, place)
        if cells[-1] == END:
            end_s = time_s
        else:
            events.append((time_s, _cell(cells, 1, place), EVENTS[cells[-1]]))
    return make_trace(events, plan.nodes, end_s if duration_s is None else duration_s, str(path))


def _machines(rows: Sequence[TraceRow], path: Path) -> list[MachineChange]:
    """Return the changes of rows milliseconds,add|remove,machine, or the differences of counted machines."""
    moved: dict[float, Counter[str]] = {}
    counts: list[tuple[float, int]] = []
    unit_s = SECONDS_PER_HOUR if path.stem.endswith("-hours") else 1.0
    for place, cells in rows:
        if _cell(cells, 1, place) in ("add", "remove"):
            moved.setdefault(_number(cells, 0, place) / MILLI, Counter())[cells[1]] += 1
        elif len(cells) == len(("date", "time", "machines")):
            counts.append((_instant_s(cells, place), _count(cells, 2, place)))
        else:
            counts.append((_number(cells, 0, place) * unit_s, _count(cells, 1, place)))
    if moved and counts:
        raise InputError(f"{path}: some rows add and remove machines, others count them; one file has one format")
    if not moved:
        return counts_as_changes(counts)
    return [MachineChange(time_s, kinds["remove"], kinds["add"]) for time_s, kinds in sorted(moved.items())]


def _from_json(text: str, path: Path, plan: Plan, rejoin_s: float, duration_s: float | None, seed: int) -> FailureTrace:
    """Return the trace of Sailor's counts, or of CheckFree's iterations."""
    content = parse_json(text, str(path), InputError)
    try:
        if isinstance(content, list):
            counts = [(sample.time_s, sample.machines) for sample in _SAMPLES.validate_python(content)]
            return on_nodes(counts_as_changes(counts), plan, str(path), duration_s=duration_s, seed=seed)
        failures = _ITERATIONS.validate_python(content)
    except ValidationError as reason:
        raise InputError(f"{path}: not a known trace ({describe(reason)}); known are {FORMATS}") from None
    return _from_iterations(failures, path, plan, rejoin_s, duration_s)


def _from_iterations(
    failures: dict[int, list[int]], path: Path, plan: Plan, rejoin_s: float, duration_s: float | None
) -> FailureTrace:
    """Return the trace of iterations at which nodes fail, the last of each list being the end.

    Nodes are numbered stage by stage, so that those of a stage, which fail together there, do so here. One that is away
    cannot fail again.
    """
    if not failures or sorted(failures) != list(range(len(failures))) or not all(failures.values()):
        raise InputError(f"{path}: expected nodes 0, 1, 2, ... with the iterations at which each fails and the end")
    iteration_s = plan.predicted.iteration_s
    nodes = [node for stage in plan.stages for node in stage.nodes]
    events: list[tuple[float, str, bool]] = []
    for position, node in enumerate(nodes):
        back_s = 0.0
        for iteration in sorted(failures[position * len(failures) // len(nodes)][:-1]):
            lost_s = iteration * iteration_s
            if lost_s >= back_s:
                back_s = lost_s + rejoin_s
                events += [(lost_s, node, False), (back_s, node, True)]
    end_s = failures[0][-1] * iteration_s if duration_s is None else duration_s
    return make_trace(events, plan.nodes, end_s, str(path))


def _cell(cells: Sequence[str], index: int, place: str) -> str:
    if index >= len(cells):
        raise InputError(f"{place}: {','.join(cells)!r} is no row of a known trace; known are {FORMATS}")
    return cells[index]


def _number(cells: Sequence[str], index: int, place: str) -> float:
    cell = _cell(cells, index, place)
    try:
        number = float(cell)
    except ValueError:
        raise InputError(f"{place}: {cell!r} is not a number; known traces are {FORMATS}") from None
    if not math.isfinite(number):
        raise InputError(f"{place}: {cell!r} is no time and no number of machines; known traces are {FORMATS}")
    return number


def _count(cells: Sequence[str], index: int, place: str) -> int:
    number = _number(cells, index, place)
    if number < 0 or not number.is_integer():
        raise InputError(f"{place}: {cells[index]!r} is no number of machines; known traces are {FORMATS}")
    return int(number)


def _instant_s(cells: Sequence[str], place: str) -> float:
    try:
        return datetime.fromisoformat(f"{cells[0]} {cells[1]}+00:00").timestamp()
    except ValueError:
        raise InputError(f"{place}: {cells[0]}, {cells[1]} is no date and time; known traces are {FORMATS}") from None
