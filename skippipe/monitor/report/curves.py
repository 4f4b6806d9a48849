"""Curves of one or several runs: loss, iteration time against its prediction, perplexity against depth kept."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from skippipe.monitor.report.run import Evaluation, Step
from skippipe.monitor.report.theme import base_layout, colour, fade, label

MOST_POINTS = 1500
LOG_RANGE = 20.0
"""From this ratio between the largest and the smallest value on, the axis is logarithmic."""


def loss_figure(runs: Mapping[str, Sequence[Step]], key: str, axis: str) -> go.Figure:
    """Draw training loss, and validation loss where measured, of each run over `key` ("tokens", "perf/elapsed_s")."""
    figure = go.Figure(layout=_layout(axis, "loss (nats a token)"))
    for index, (name, steps) in enumerate(runs.items()):
        training = thin([(step[key], step["train/loss"]) for step in steps if key in step and "train/loss" in step])
        checks = [(step[key], step["val/loss"]) for step in steps if key in step and "val/loss" in step]
        line = {"color": colour(index), "width": 2}
        figure.add_trace(_curve(f"{name}, training", training, mode="lines", line=line))
        if checks:
            dashed = {"color": colour(index), "width": 1.5, "dash": "dot"}
            figure.add_trace(_curve(f"{name}, validation", checks, mode="lines+markers", line=dashed))
    return figure


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `MOST_POINTS` points: the means of equal blocks of neighbours."""
    block = math.ceil(len(points) / MOST_POINTS) or 1
    if block == 1:
        return list(points)
    blocks = [points[start : start + block] for start in range(0, len(points), block)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in blocks]


def iteration_figure(measured_s: Mapping[str, Sequence[float]], predicted_s: Mapping[str, float]) -> go.Figure:
    """Draw the spread of each run's measured iteration times (seconds) beside the plan's prediction."""
    figure = go.Figure(layout=_layout("", "iteration time (s)", height=380))
    for index, (name, durations_s) in enumerate(measured_s.items()):
        figure.add_trace(
            go.Box(
                name=label(name),
                x=[label(name)] * len(durations_s),
                y=list(durations_s),
                boxpoints="outliers",
                marker={"color": colour(index), "size": 4},
                line={"width": 1.8},
                fillcolor=fade(colour(index), 0.25),
                width=0.3,
                showlegend=False,
            )
        )
    figure.add_trace(
        go.Scatter(
            name="predicted by the plan",
            x=[label(name) for name in predicted_s],
            y=list(predicted_s.values()),
            mode="markers",
            marker={"symbol": "line-ew", "size": 90, "line": {"width": 3, "color": "#e05d8a"}, "color": "#e05d8a"},
            hovertemplate="%{x}<br>predicted %{y:.4~g} s<extra></extra>",
        )
    )
    figure.update_yaxes(rangemode="tozero")
    return figure


def depth_figure(evaluations: Mapping[str, Evaluation]) -> go.Figure:
    """Draw perplexity (mean and standard deviation over draws) against the share of depth computed."""
    figure = go.Figure(layout=_layout("share of the depth computed (%)", "perplexity", height=400))
    values = []
    for index, (name, evaluation) in enumerate(evaluations.items()):
        results = sorted(evaluation.results, key=lambda result: result.share_computed)
        values += [result.perplexity for result in results if math.isfinite(result.perplexity)]
        figure.add_trace(
            go.Scatter(
                name=label(name),
                x=[result.share_computed * 100 for result in results],
                y=[result.perplexity for result in results],
                error_y={"type": "data", "array": [r.perplexity_std for r in results], "thickness": 1.2, "width": 4},
                mode="lines+markers",
                line={"color": colour(index), "width": 2},
                marker={"size": 8},
                customdata=[(result.kept_stages, result.samples) for result in results],
                hovertemplate="%{x:.3~g} % of the depth (%{customdata[0]} stages)<br>perplexity %{y:.4~g}"
                "<br>%{customdata[1]} batches<extra>%{fullData.name}</extra>",
            )
        )
    if values and max(values) > LOG_RANGE * min(values) > 0:
        figure.update_yaxes(type="log")
    figure.update_xaxes(ticksuffix=" %", title={"text": "share of the depth computed"})
    return figure


def _curve(name: str, points: Sequence[tuple[float, float]], **style: Any) -> go.Scatter:
    return go.Scatter(
        name=label(name),
        x=[x for x, _ in points],
        y=[y for _, y in points],
        hovertemplate="%{x:.4~s}<br>loss %{y:.4~f}<extra>%{fullData.name}</extra>",
        **style,
    )


def _layout(x_title: str, y_title: str, height: int = 360) -> dict[str, Any]:
    return base_layout(height) | {
        "xaxis": {"title": {"text": x_title}, "zeroline": False},
        "yaxis": {"title": {"text": y_title}, "zeroline": False},
    }
