"""Map of the routes: nodes in columns by stage, a line per microbatch, drawn past the stages it skips.

Where nodes only relay messages of a microbatch, its line goes through them, too, and is marked there.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from skippipe.monitor.report.theme import NEUTRAL, base_layout, colour, fade, label, relay_marker
from skippipe.monitor.report.units import visits_text
from skippipe_scheduler.plan.plan import Plan

Point = tuple[float, float]
LANE = 0.07
"""Distance between two routes through one node, in units of the distance between nodes."""


@dataclass(frozen=True)
class RouteMap:
    """Places of a plan's nodes (x: stage, y: replica, the column centred on 0) and the lines between them."""

    plan: Plan

    @cached_property
    def place(self) -> dict[str, Point]:
        """Centre of each node."""
        return {
            node: (float(index), position - (len(stage.nodes) - 1) / 2)
            for index, stage in enumerate(self.plan.stages)
            for position, node in enumerate(stage.nodes)
        }

    @cached_property
    def group_of(self) -> dict[str, str]:
        """What gives each node its colour: its region, or its name at stage 0 where no regions are given."""
        if self.plan.regions is not None:
            return dict(zip(self.plan.nodes, self.plan.regions, strict=True))
        return {node: node if self.plan.stage_of[node] == 0 else "further nodes" for node in self.plan.nodes}

    @cached_property
    def colour_of(self) -> dict[str, str]:
        """Colour of each group, in the order in which the groups appear."""
        groups = list(dict.fromkeys(self.group_of.values()))
        return {group: NEUTRAL if group == "further nodes" else colour(index) for index, group in enumerate(groups)}

    @cached_property
    def traffic(self) -> Counter[tuple[str, str]]:
        """Microbatches that go straight from one node to another in the forward (not back to the origin)."""
        return Counter(pair for microbatch in self.plan.microbatches for pair in pairwise(microbatch.whole_path))

    @cached_property
    def _lane(self) -> dict[tuple[int, str], float]:
        visitors: dict[str, list[int]] = defaultdict(list)
        for microbatch in self.plan.microbatches:
            for node in microbatch.whole_path:
                visitors[node].append(microbatch.id)
        width = {node: min(LANE, 0.5 / len(ids)) for node, ids in visitors.items()}
        return {
            (microbatch, node): (index - (len(ids) - 1) / 2) * width[node]
            for node, ids in visitors.items()
            for index, microbatch in enumerate(ids)
        }

    def line(self, microbatch: int) -> list[Point]:
        """Return the points of a path; it runs through a gap between the nodes of a stage that it does not come to."""
        path = self.plan.microbatches[microbatch].whole_path
        stops = [self.stop(microbatch, node) for node in path]
        points = stops[:1]
        for start, stop in pairwise(stops):
            points += [*self._past(start, stop, self._lane[microbatch, path[0]]), stop]
        return points

    def stop(self, microbatch: int, node: str) -> Point:
        """Return where the line of a microbatch meets a node."""
        x, y = self.place[node]
        return x, y + self._lane[microbatch, node]

    def band(self, source: str, target: str) -> list[Point]:
        """Return the points of the connection between two nodes, past skipped stages like a route."""
        start, stop = self.place[source], self.place[target]
        return [start, *self._past(start, stop, 0.0), stop]

    def _past(self, start: Point, stop: Point, lane: float) -> list[Point]:
        step = 1 if stop[0] > start[0] else -1
        columns = range(round(start[0]) + step, round(stop[0]), step)
        points = []
        for column in columns:
            straight = start[1] + (stop[1] - start[1]) * (column - start[0]) / (stop[0] - start[0])
            ys = [self.place[node][1] for node in self.plan.stages[column].nodes]
            gaps = [ys[0] - 0.5, *(y + 0.5 for y in ys)] if ys else [straight]
            points.append((float(column), min(gaps, key=lambda gap: abs(gap - straight)) + lane))
        return points


def routes_figure(plan: Plan) -> go.Figure:
    """Draw the map of all routes of a plan over pale bands that are as wide as the traffic."""
    routes = RouteMap(plan)
    figure = go.Figure(layout=_layout(plan))
    figure.add_traces([*_bands(routes), *_lines(routes), *_nodes(routes), *_relays(routes), _traffic_labels(routes)])
    return figure


def _bands(routes: RouteMap) -> list[go.Scatter]:
    """Return one trace per amount of traffic (a trace has one line width)."""
    most = max(routes.traffic.values(), default=1)
    by_amount: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for pair, amount in routes.traffic.items():
        by_amount[amount].append(pair)
    return [
        go.Scatter(
            **_polyline([routes.band(source, target) for source, target in pairs]),
            mode="lines",
            line={"width": 2 + 16 * amount / most, "color": fade(NEUTRAL, 0.13)},
            hoverinfo="skip",
            showlegend=False,
        )
        for amount, pairs in sorted(by_amount.items())
    ]


def _lines(routes: RouteMap) -> list[go.Scatter]:
    """Return one trace per origin group, with one line for each of its microbatches."""
    by_group: dict[str, list[int]] = defaultdict(list)
    for microbatch in routes.plan.microbatches:
        by_group[routes.group_of[microbatch.route[0]]].append(microbatch.id)
    traces = []
    for group, microbatches in by_group.items():
        lines = [routes.line(microbatch) for microbatch in microbatches]
        texts = [_describe(routes.plan, microbatch) for microbatch in microbatches]
        hover = [text for line, text in zip(lines, texts, strict=True) for text in [text] * len(line) + [""]]
        traces.append(
            go.Scatter(
                **_polyline(lines),
                mode="lines",
                line={"width": 1.6, "color": fade(routes.colour_of[group], 0.75), "shape": "linear"},
                text=hover,
                hovertemplate="%{text}<extra></extra>",
                legendgroup=group,
                showlegend=False,
            )
        )
    return traces


def _nodes(routes: RouteMap) -> list[go.Scatter]:
    by_group: dict[str, list[str]] = defaultdict(list)
    for node in routes.plan.nodes:
        by_group[routes.group_of[node]].append(node)
    visits = Counter(node for microbatch in routes.plan.microbatches for node in microbatch.route)
    relayed = Counter(node for microbatch in routes.plan.microbatches for node in microbatch.relays)
    return [
        go.Scatter(
            x=[routes.place[node][0] for node in nodes],
            y=[routes.place[node][1] for node in nodes],
            mode="markers+text",
            marker={
                "size": 17,
                "color": routes.colour_of[group],
                "line": {"width": 1.5, "color": "rgba(255,255,255,0.8)"},
            },
            text=[label(node) for node in nodes],
            textposition="bottom center",
            textfont={"size": 11},
            customdata=[
                (routes.plan.stage_of[node], label(group), visits_text(visits[node], relayed[node])) for node in nodes
            ],
            hovertemplate="<b>%{text}</b><br>stage %{customdata[0]}, %{customdata[1]}<br>"
            "microbatches an iteration: %{customdata[2]}<extra></extra>",
            name=label(group),
            legendgroup=group,
        )
        for group, nodes in by_group.items()
    ]


def _relays(routes: RouteMap) -> list[go.Scatter]:
    """Return one trace with a mark wherever a line goes through a node that only relays, none where none does."""
    marked = [
        (microbatch.id, node)
        for microbatch in routes.plan.microbatches
        for node in microbatch.whole_path
        if node in microbatch.relays
    ]
    stops = [routes.stop(microbatch, node) for microbatch, node in marked]
    trace = go.Scatter(
        x=[x for x, _ in stops],
        y=[y for _, y in stops],
        mode="markers",
        marker=relay_marker("RF"),
        text=[f"{label(node)} relays microbatch {microbatch}" for microbatch, node in marked],
        hovertemplate="%{text}<extra></extra>",
        name="Relay",
    )
    return [trace] if marked else []


def _traffic_labels(routes: RouteMap) -> go.Scatter:
    """Return invisible points in the middle of each connection that tell its traffic on hovering."""
    pairs = list(routes.traffic)
    return go.Scatter(
        x=[(routes.place[a][0] + routes.place[b][0]) / 2 for a, b in pairs],
        y=[(routes.place[a][1] + routes.place[b][1]) / 2 for a, b in pairs],
        mode="markers",
        marker={"size": 10, "color": "rgba(0,0,0,0)"},
        text=[f"{label(a)} → {label(b)}<br>{routes.traffic[a, b]} microbatches an iteration" for a, b in pairs],
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )


def _polyline(lines: Sequence[Sequence[Point]]) -> dict[str, list[float | None]]:
    """Return coordinates in which `None` lifts the pen between two lines."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    for line in lines:
        xs += [*(x for x, _ in line), None]
        ys += [*(y for _, y in line), None]
    return {"x": xs, "y": ys}


def _describe(plan: Plan, microbatch: int) -> str:
    described = plan.microbatches[microbatch]
    visited = {plan.stage_of[node] for node in described.route}
    skipped = [str(stage) for stage in range(len(plan.stages)) if stage not in visited]
    stops = " → ".join(
        f"{label(node)} (relay)" if node in described.relays else label(node) for node in described.whole_path
    )
    return f"<b>Microbatch {microbatch}</b><br>{stops}<br>skips stage {', '.join(skipped) or '(none)'}"


def _layout(plan: Plan) -> dict[str, Any]:
    tallest = max(len(stage.nodes) for stage in plan.stages)
    half = (tallest - 1) / 2 + 0.75
    columns = list(range(len(plan.stages)))
    return base_layout(height=150 + 72 * tallest) | {
        "xaxis": {
            "tickvals": columns,
            "ticktext": [
                f"stage {index}<br>layers {stage.layers[0]}–{stage.layers[1] - 1}"
                for index, stage in enumerate(plan.stages)
            ],
            "range": [-0.5, len(columns) - 0.5],
            "zeroline": False,
            "showgrid": True,
        },
        "yaxis": {"visible": False, "range": [half, -half]},
    }
