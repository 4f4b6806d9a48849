"""Load and memory of every node over an iteration: a row per node, a cell per part of the time."""

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from skippipe.monitor.report.figures.gantt import ROW_PIXELS, Row, gantt_rows, node_axis
from skippipe.monitor.report.theme import OPERATION_COLOURS, base_layout, fade, label
from skippipe_scheduler.analysis.usage import LOAD_PARTS, Analysis
from skippipe_scheduler.plan.plan import Plan


def load_figure(plan: Plan, analysis: Analysis) -> go.Figure:
    """Draw the share of time that each node computes in each part of the iteration."""
    load = {node.node: node.load for node in analysis.nodes}
    rows = gantt_rows(plan)
    percents = [[round(100 * share, 1) for share in load[row.node]] for row in rows]
    hover = "<b>%{text}</b><br>computes %{z} % of the time around %{x:.4g} s<extra></extra>"
    return _map(rows, analysis.iteration_s, percents, "Load: share of the time computing", "F", hover)


def memory_figure(plan: Plan, analysis: Analysis) -> go.Figure:
    """Draw the most microbatches that each node holds in each part of the iteration, out of those that fit."""
    nodes = {node.node: node for node in analysis.nodes}
    rows = gantt_rows(plan)
    held = [held_in_parts(nodes[row.node].held, analysis.iteration_s) for row in rows]
    percents = [
        [round(100 * number / nodes[row.node].memory, 1) for number in numbers]
        for row, numbers in zip(rows, held, strict=True)
    ]
    hover = "<b>%{text}</b><br>%{customdata} microbatches, %{z} % of its room, around %{x:.4g} s<extra></extra>"
    title = "Memory: microbatches held, of those that fit"
    return _map(rows, analysis.iteration_s, percents, title, "B", hover, held)


def held_in_parts(steps: Sequence[tuple[float, int]], iteration_s: float, parts: int = LOAD_PARTS) -> list[int]:
    """Return the most microbatches held in each of `parts` equal parts of the iteration, from a step series."""
    width_s = iteration_s / parts
    most = [0] * parts
    ends = [*(second for second, _ in steps[1:]), iteration_s]
    for (start_s, number), end_s in zip(steps, ends, strict=True):
        first = min(int(start_s / width_s), parts - 1) if width_s else 0
        last = min(math.ceil(end_s / width_s), parts) if width_s else 0
        for part in range(first, max(first + 1, last)):
            most[part] = max(most[part], number)
    return most


def _map(
    rows: Sequence[Row],
    iteration_s: float,
    percents: Sequence[Sequence[float]],
    title: str,
    operation: str,
    hover: str,
    details: Sequence[Sequence[int]] | None = None,
) -> go.Figure:
    width_s = iteration_s / LOAD_PARTS
    colour = OPERATION_COLOURS[operation]
    heatmap = go.Heatmap(
        x=[(part + 0.5) * width_s for part in range(LOAD_PARTS)],
        y=list(range(len(rows))),
        z=percents,
        customdata=details,
        text=[[label(row.node)] * LOAD_PARTS for row in rows],
        zmin=0,
        zmax=100,
        colorscale=[[0, fade(colour, 0.04)], [1, colour]],
        colorbar={"title": {"text": "%"}, "thickness": 12},
        hovertemplate=hover,
    )
    return go.Figure(data=[heatmap], layout=_layout(rows, title))


def _layout(rows: Sequence[Row], title: str) -> dict[str, Any]:
    return base_layout(height=110 + ROW_PIXELS * max(len(rows), 3)) | {
        "title": {"text": title, "x": 0, "xref": "paper", "font": {"size": 15}, "y": 0.99, "yanchor": "top"},
        "xaxis": {"title": {"text": "time (s)"}, "zeroline": False, "showgrid": False},
        "yaxis": node_axis(rows),
    }
