"""Map of a plan's regions: near each other where messages take little time, lines as wide as what crosses."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from skippipe.monitor.report.theme import NEUTRAL, base_layout, colour, fade, label
from skippipe_scheduler.analysis.usage import LinkAnalysis, analyse
from skippipe_scheduler.plan.plan import Plan

WIDEST = 14.0
"""Pixels of the line that carries most."""


@dataclass(frozen=True)
class RegionMap:
    """Places of a plan's regions in ms, and what crosses between each two of them in an iteration, both ways."""

    plan: Plan

    @cached_property
    def region_of(self) -> dict[str, str]:
        """The region of each node."""
        return dict(zip(self.plan.nodes, self.plan.regions or (), strict=True))

    @cached_property
    def num_nodes(self) -> Counter[str]:
        """Nodes of each region, in the order in which regions appear."""
        return Counter(self.region_of.values())

    @cached_property
    def delays_ms(self) -> npt.NDArray[np.float64]:
        """Mean ms from region to region, both ways alike (regions, regions); of a message where no latency is given."""
        delay_s: Mapping[str, Mapping[str, float]] = self.plan.costs.latency_s or self.plan.costs.transfer_s
        index = {region: place for place, region in enumerate(self.num_nodes)}
        total_ms, pairs = np.zeros((2, len(index), len(index)))
        for source, here in self.region_of.items():
            for sink, there in self.region_of.items():
                if here != there:
                    total_ms[index[here], index[there]] += 1e3 * delay_s[source][sink]
                    pairs[index[here], index[there]] += 1
        mean_ms = total_ms / np.maximum(pairs, 1)
        return (mean_ms + mean_ms.T) / 2

    @cached_property
    def place(self) -> dict[str, tuple[float, float]]:
        """Where each region is, so that distances are as near to the delays as two dimensions allow, in ms.

        Classical scaling (Torgerson, "Multidimensional scaling: I. Theory and method", 1952).
        """
        count = len(self.num_nodes)
        centring = np.eye(count) - 1 / count
        products = -centring @ self.delays_ms**2 @ centring / 2  # (regions, regions), of the places' vectors
        values, vectors = np.linalg.eigh(products)  # ascending
        axes = vectors[:, ::-1][:, :2] * np.sqrt(np.maximum(values[::-1][:2], 0.0))  # (regions, 2)
        farthest = np.abs(axes).argmax(axis=0)
        axes *= np.where(np.take_along_axis(axes, farthest[None], axis=0) < 0, -1.0, 1.0)  # a sign is free
        return {region: (float(x), float(y)) for region, (x, y) in zip(self.num_nodes, axes, strict=True)}

    @cached_property
    def traffic(self) -> dict[tuple[str, str], list[LinkAnalysis]]:
        """Links between nodes that carry something, by their two regions in the order in which regions appear."""
        order = {region: place for place, region in enumerate(self.num_nodes)}
        found: dict[tuple[str, str], list[LinkAnalysis]] = defaultdict(list)
        for link in analyse(self.plan).links:
            ends = sorted((self.region_of[link.source], self.region_of[link.destination]), key=order.__getitem__)
            if ends[0] != ends[1]:
                found[ends[0], ends[1]].append(link)
        return dict(found)


def regions_figure(plan: Plan) -> go.Figure:
    """Draw the map of a plan that has regions."""
    regions = RegionMap(plan)
    figure = go.Figure(layout=_layout())
    figure.add_traces([*_lines(regions), _middles(regions), _places(regions)])
    return figure


def _messages(links: Sequence[LinkAnalysis]) -> int:
    return sum(link.num_transfers for link in links)


def _lines(regions: RegionMap) -> list[go.Scatter]:
    most = max(map(_messages, regions.traffic.values()), default=1)
    return [
        go.Scatter(
            x=[regions.place[a][0], regions.place[b][0]],
            y=[regions.place[a][1], regions.place[b][1]],
            mode="lines",
            line={"width": max(1.0, WIDEST * _messages(links) / most), "color": fade(NEUTRAL, 0.45)},
            hoverinfo="skip",
            showlegend=False,
        )
        for (a, b), links in regions.traffic.items()
    ]


def _middles(regions: RegionMap) -> go.Scatter:
    """Return invisible points in the middle of each line that tell what it carries on hovering."""
    ends = list(regions.traffic)
    return go.Scatter(
        x=[(regions.place[a][0] + regions.place[b][0]) / 2 for a, b in ends],
        y=[(regions.place[a][1] + regions.place[b][1]) / 2 for a, b in ends],
        mode="markers",
        marker={"size": 14, "color": "rgba(0,0,0,0)"},
        text=[_describe(a, b, links) for (a, b), links in regions.traffic.items()],
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )


def _describe(a: str, b: str, links: Sequence[LinkAnalysis]) -> str:
    lines = [f"<b>{label(a)} and {label(b)}</b>", f"{_messages(links):,} messages an iteration, both ways"]
    if all(link.num_bytes is not None for link in links):
        lines.append(f"{sum(link.num_bytes or 0 for link in links) / 1e9:.3g} GB")
    busiest = max(links, key=lambda link: link.occupancy)
    lines.append(
        f"busiest: {label(busiest.source)} → {label(busiest.destination)}, {busiest.occupancy:.0%} of the time"
    )
    return "<br>".join(lines)


def _places(regions: RegionMap) -> go.Scatter:
    names = list(regions.num_nodes)
    return go.Scatter(
        x=[regions.place[name][0] for name in names],
        y=[regions.place[name][1] for name in names],
        mode="markers+text",
        marker={
            "size": [12 + 3 * regions.num_nodes[name] ** 0.5 for name in names],
            "color": [colour(index) for index in range(len(names))],
            "line": {"width": 1.5, "color": "rgba(255,255,255,0.8)"},
        },
        text=[label(name) for name in names],
        textposition="bottom center",
        textfont={"size": 11},
        customdata=[regions.num_nodes[name] for name in names],
        hovertemplate="<b>%{text}</b><br>%{customdata} nodes<extra></extra>",
        showlegend=False,
    )


def _layout() -> dict[str, Any]:
    return base_layout(height=520) | {
        "xaxis": {"title": "ms, one way", "zeroline": False, "showgrid": True},
        "yaxis": {"zeroline": False, "showgrid": True, "scaleanchor": "x"},
    }
