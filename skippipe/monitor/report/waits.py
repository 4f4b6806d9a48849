"""What the iteration waits for: the critical path as a line over the Gantt chart and as tables."""

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from skippipe.monitor.report.page import Bar, Table
from skippipe.monitor.report.theme import label
from skippipe.monitor.report.units import percent, seconds
from skippipe_scheduler.analysis.critical_path import REASONS, CriticalPath, PathSegment
from skippipe_scheduler.plan.plan import Plan

COLOUR = "#d6246e"
BELOW_BAR = 0.43
"""Distance of the line from the middle of a node's row, so that it covers no number."""
MOST_PLACES = 12


def path_line(path: CriticalPath, position: Mapping[str, int]) -> go.Scatter:
    """Draw the path below the bars of its tasks; a slope is a transfer. Nodes without a row leave a gap."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    texts: list[str] = []
    for segment in path.segments:
        ends = _ends(segment)
        rows = [position.get(node) for node in ends]
        if None in rows:
            xs, ys, texts = [*xs, None], [*ys, None], [*texts, ""]
            continue
        xs += [round(segment.start_s, 7), round(segment.end_s, 7)]
        ys += [row + BELOW_BAR for row in rows if row is not None]
        texts += [_describe(segment)] * 2
    line: dict[str, Any] = {"color": COLOUR, "width": 2.5}
    return go.Scatter(
        x=xs,
        y=ys,
        text=texts,
        mode="lines",
        line=line,
        name="Critical path",
        hovertemplate="%{text}<extra></extra>",
    )


def path_tables(plan: Plan, path: CriticalPath) -> list[Table]:
    """Return the seconds of the critical path by kind, by region where there are any, and by node and link."""
    places = dict(list(path.by_place.items())[:MOST_PLACES])
    tables = [_shares("Kind of work or waiting", "By kind", path.by_kind, path.iteration_s)]
    regions = path.by_region(plan)
    if regions:
        tables.append(_shares("Region", "By region", regions, path.iteration_s))
    left_out = len(path.by_place) - len(places)
    more = f"; {left_out} smaller ones are left out" if left_out else ""
    return [*tables, _shares("Node or link", f"By node and link{more}", places, path.iteration_s)]


def _shares(column: str, caption: str, seconds_of: Mapping[str, float], whole_s: float) -> Table:
    shares = {name: value_s / whole_s if whole_s else 0.0 for name, value_s in seconds_of.items()}
    rows = [(name, seconds(value_s), Bar(percent(shares[name]), shares[name])) for name, value_s in seconds_of.items()]
    return Table(f"{caption}.", (column, "Time", "Share of the iteration"), rows)


def _ends(segment: PathSegment) -> tuple[str, str]:
    """Return the nodes at which the line of a segment begins and ends; queueing stays where it is."""
    if segment.kind == "transfer" and segment.destination is not None:
        return segment.node, segment.destination
    return segment.node, segment.node


def _describe(segment: PathSegment) -> str:
    whose = "" if segment.microbatch < 0 else f" of microbatch {segment.microbatch}"
    return (
        f"<b>Critical path: {segment.kind}{whose}</b><br>{label(segment.place)}<br>"
        f"starts at {seconds(segment.start_s)}, takes {seconds(segment.duration_s)}; {REASONS[segment.reason]}"
    )
