"""Gantt chart of one iteration: a row per node, grouped by region and stage, a bar per task, a mark per relay."""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import plotly.graph_objects as go

from skippipe.monitor.report.spans import REDUCE, ChartSpan, end_s
from skippipe.monitor.report.theme import (
    FAINT,
    OPERATION_COLOURS,
    OPERATION_NAMES,
    RELAY_SYMBOLS,
    base_layout,
    label,
    relay_marker,
)
from skippipe.monitor.report.units import seconds
from skippipe.monitor.report.waits import path_line
from skippipe_scheduler.analysis.critical_path import CriticalPath
from skippipe_scheduler.plan.plan import Plan

ROW_PIXELS = 24
NUMBERED_BARS = 600
"""With more bars than this the microbatch's number is shown on hovering only: text is slow to draw."""

MOST_BARS = 20_000
"""More bars than this make a page slow; the busiest nodes are drawn then."""
MOST_ROWS = 40
"""So many nodes are drawn at most where there are too many bars."""


class Row(NamedTuple):
    """One node's row of the chart."""

    node: str
    stage: int
    group: str


def gantt_rows(plan: Plan) -> list[Row]:
    """Return the rows from top to bottom: by region in the plan's order, then stage, then rank."""
    regions = plan.regions or ("",) * len(plan.nodes)
    first = {region: regions.index(region) for region in regions}
    ranks = sorted(
        range(len(plan.nodes)),
        key=lambda rank: (first[regions[rank]], plan.stage_of[plan.nodes[rank]], rank),
    )
    return [Row(plan.nodes[rank], plan.stage_of[plan.nodes[rank]], regions[rank]) for rank in ranks]


class Selection(NamedTuple):
    """The part of an iteration that is drawn; `note` says what is left out, and is empty where nothing is."""

    spans: Sequence[ChartSpan]
    nodes: Collection[str]
    note: str


def select(plan: Plan, spans: Sequence[ChartSpan], most_bars: int = MOST_BARS) -> Selection:
    """Return all of `spans`, or where that is more than `most_bars` those of the busiest nodes (at least one)."""
    if len(spans) <= most_bars:
        return Selection(spans, plan.nodes, "")
    busy_s: dict[str, float] = defaultdict(float)
    for span in spans:
        busy_s[span.node] += span.end_s - span.start_s
    bars = Counter(span.node for span in spans)
    ranked = sorted(busy_s, key=lambda node: -busy_s[node])[:MOST_ROWS]
    room = [bars_so_far <= most_bars for bars_so_far in accumulate(bars[node] for node in ranked)]
    nodes = ranked[: max(1, sum(room))]
    chosen = [span for span in spans if span.node in nodes][:most_bars]
    note = f"To keep the page quick, only the {len(nodes)} busiest of {len(plan.nodes)} nodes are drawn"
    return Selection(chosen, nodes, f"{note}." if room[0] else f"{note}, up to bar {most_bars:,}.")


def gantt_figure(
    plan: Plan,
    spans: Sequence[ChartSpan],
    title: str,
    axis_end_s: float | None = None,
    *,
    nodes: Collection[str] | None = None,
    path: CriticalPath | None = None,
) -> go.Figure:
    """Draw `spans` over the nodes of `plan`; one trace per operation, so that thousands of bars stay quick.

    `axis_end_s` fixes the end of the time axis in seconds, so that several charts can be compared by eye. Only
    `nodes` get a row, where they are given. The critical `path` is drawn as a line.
    """
    rows = [row for row in gantt_rows(plan) if nodes is None or row.node in nodes]
    figure = go.Figure(layout=_layout(rows, title, axis_end_s or end_s(spans)))
    position = {row.node: index for index, row in enumerate(rows)}
    known = [span for span in spans if span.node in position]
    for operation in OPERATION_NAMES:
        chosen = [span for span in known if span.operation == operation]
        if chosen and operation in RELAY_SYMBOLS:
            figure.add_trace(_marks(plan, operation, chosen, position))
        elif chosen:
            figure.add_trace(_bars(plan, operation, chosen, position, numbered=len(known) <= NUMBERED_BARS))
    if path is not None:
        figure.add_trace(path_line(path, position))
    return figure


def _bars(plan: Plan, operation: str, spans: Sequence[ChartSpan], position: dict[str, int], numbered: bool) -> go.Bar:
    marker: dict[str, Any] = {
        "color": OPERATION_COLOURS[operation],
        "line": {"width": 0.5, "color": "rgba(0,0,0,0.25)"},
    }
    if operation == REDUCE:
        marker["pattern"] = {"shape": "/", "size": 6, "solidity": 0.35}
    return go.Bar(
        name=OPERATION_NAMES[operation],
        orientation="h",
        width=0.78,
        y=[position[span.node] for span in spans],
        base=[round(span.start_s, 7) for span in spans],
        x=[round(span.end_s - span.start_s, 7) for span in spans],
        text=[str(span.microbatch) for span in spans] if numbered and operation != REDUCE else None,
        textposition="inside",
        insidetextanchor="middle",
        textangle=0,
        insidetextfont={"color": "#10151f"},
        marker=marker,
        **_hover(plan, operation, spans),
    )


def _marks(plan: Plan, operation: str, spans: Sequence[ChartSpan], position: dict[str, int]) -> go.Scatter:
    """Return a triangle for each relay, which points to where it passes the message: on along the path, or back."""
    return go.Scatter(
        name=OPERATION_NAMES[operation],
        mode="markers",
        x=[round(span.start_s, 7) for span in spans],
        y=[position[span.node] for span in spans],
        marker=relay_marker(operation),
        **_hover(plan, operation, spans),
    )


def _hover(plan: Plan, operation: str, spans: Sequence[ChartSpan]) -> dict[str, Any]:
    """Return what is shown on pointing at one of `spans`."""
    details = [
        (
            label(span.node),
            span.microbatch,
            _hop(plan, span),
            seconds(span.start_s),
            seconds(span.end_s - span.start_s),
        )
        for span in spans
    ]
    of_microbatch = "" if operation == REDUCE else " of microbatch %{customdata[1]}, hop %{customdata[2]}"
    template = (
        f"<b>%{{customdata[0]}}</b><br>{OPERATION_NAMES[operation]}{of_microbatch}<br>"
        "starts at %{customdata[3]}, takes %{customdata[4]}<extra></extra>"
    )
    return {"customdata": details, "hovertemplate": template}


def _hop(plan: Plan, span: ChartSpan) -> int:
    """Return the place of the node on the microbatch's path, -1 where it is not on it."""
    if not 0 <= span.microbatch < len(plan.microbatches):
        return -1
    path = plan.microbatches[span.microbatch].whole_path
    return path.index(span.node) if span.node in path else -1


def _layout(rows: Sequence[Row], title: str, axis_end_s: float) -> dict[str, Any]:
    layout = base_layout(height=120 + ROW_PIXELS * max(len(rows), 3))
    bands, names = _bands(rows)
    return layout | {
        "title": {
            "text": label(title),
            "x": 0,
            "xref": "paper",
            "font": {"size": 15},
            "y": 0.99,
            "yanchor": "top",
        },
        "margin": {"l": 64, "r": 24 if not names else 90, "t": 62, "b": 48},
        "legend": layout["legend"] | {"x": 1, "xanchor": "right"},
        "barmode": "overlay",
        "uniformtext": {"minsize": 9, "mode": "hide"},
        "xaxis": {"range": [0, axis_end_s * 1.01 or 1], "title": {"text": "time (s)"}, "zeroline": False},
        "yaxis": node_axis(rows),
        "shapes": bands,
        "annotations": names,
    }


def node_axis(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the vertical axis with one place for each row, from top to bottom."""
    return {
        "tickvals": list(range(len(rows))),
        "ticktext": [f"{label(row.node)} · stage {row.stage}" for row in rows],
        "range": [len(rows) - 0.5, -0.5],
        "fixedrange": True,
        "showgrid": False,
        "zeroline": False,
    }


def _bands(rows: Sequence[Row]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return a shade behind every second region and the regions' names at the right edge."""
    bands, names, top = [], [], 0
    for index, (group, members) in enumerate(groupby(rows, key=lambda row: row.group)):
        height = len(list(members))
        edges = {"y0": top - 0.5, "y1": top + height - 0.5, "x0": 0, "x1": 1}
        if index % 2 == 0:
            bands.append(
                edges
                | {
                    "type": "rect",
                    "xref": "paper",
                    "fillcolor": FAINT,
                    "line": {"width": 0},
                    "layer": "below",
                }
            )
        if group:
            middle = top + (height - 1) / 2
            place = {"x": 1.008, "y": middle, "xref": "paper", "xanchor": "left", "showarrow": False}
            names.append(place | {"text": label(group), "font": {"size": 12}})
        top += height
    return bands, names
