"""Curves of runs: loss, iteration time beside its prediction, perplexity against depth kept."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from skippipe.monitor.evaluation_results import DepthResult, Evaluation
from skippipe.monitor.metrics import Metric
from skippipe.monitor.report.run_record import Step
from skippipe.monitor.report.theme import NEUTRAL, base_layout, colour, dash, label, symbol
from skippipe.monitor.report.units import seconds

MOST_POINTS = 1500
LOG_RANGE = 20.0
"""From this ratio between the largest and the smallest value on, the axis is logarithmic."""


def loss_figure(runs: Mapping[str, Sequence[Step]], over: Metric, axis: str) -> go.Figure:
    """Draw each run's training and validation loss over another metric: tokens, or the time."""
    figure = go.Figure(layout=_layout(axis, "loss (nats a token)"))
    figure.update_xaxes(rangemode="tozero")
    for index, (name, steps) in enumerate(runs.items()):
        training = thin(_points(steps, over, Metric.TRAIN_LOSS))
        checks = _points(steps, over, Metric.VALIDATION_LOSS)
        line = {"color": colour(index), "width": 2}
        figure.add_trace(_curve(f"{name}, training", training, mode="lines", line=line))
        if checks:
            dashed = {"color": colour(index), "width": 1.5, "dash": "dot"}
            figure.add_trace(_curve(f"{name}, validation", checks, mode="lines+markers", line=dashed))
    return figure


def _points(steps: Sequence[Step], over: Metric, metric: Metric) -> list[tuple[float, float]]:
    return [(step[over], step[metric]) for step in steps if over in step and metric in step]


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `MOST_POINTS` points: the means of equal blocks of neighbours."""
    block = math.ceil(len(points) / MOST_POINTS) or 1
    if block == 1:
        return list(points)
    blocks = [points[start : start + block] for start in range(0, len(points), block)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in blocks]


def iteration_figure(measured_s: Mapping[str, Sequence[float]], predicted_s: Mapping[str, float]) -> go.Figure:
    """Draw each run's predicted iteration time and the median of the measured ones (seconds).

    The line on the measured bar goes from their 5th to their 95th percentile.
    """
    names = [label(name) for name in measured_s]
    medians = [statistics.median(durations_s) for durations_s in measured_s.values()]
    spreads = [percentiles(durations_s) for durations_s in measured_s.values()]
    error = {
        "type": "data",
        "symmetric": False,
        "color": "#e05d8a",
        "thickness": 2.5,
        "array": [high - median for (_, high), median in zip(spreads, medians, strict=True)],
        "arrayminus": [median - low for (low, _), median in zip(spreads, medians, strict=True)],
    }
    layout = _layout("iteration time (s)", "", height=130 + 80 * len(names))
    figure = go.Figure(layout=layout | {"barmode": "group", "bargap": 0.3, "bargroupgap": 0.08})
    figure.add_trace(_time_bars("predicted by the plan", names, list(predicted_s.values()), NEUTRAL))
    figure.add_trace(_time_bars("measured (median)", names, medians, colour(0), error_x=error))
    figure.update_yaxes(autorange="reversed", showgrid=False, fixedrange=True)
    return figure


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the 5th and the 95th percentile."""
    if len(values) < 2:
        return values[0], values[0]
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return cuts[0], cuts[-1]


def _time_bars(name: str, names: list[str], values_s: list[float], fill: str, **style: Any) -> go.Bar:
    return go.Bar(
        name=name,
        orientation="h",
        y=names,
        x=values_s,
        text=[seconds(value) for value in values_s],
        textposition="inside",
        insidetextanchor="start",
        insidetextfont={"color": "#10151f", "size": 13},
        marker={"color": fill},
        hovertemplate="%{y}, %{fullData.name}<br>%{text}<extra></extra>",
        **style,
    )


def depth_figure(evaluations: Mapping[str, Evaluation]) -> go.Figure:
    """Draw perplexity against the share of depth computed, a line for each model and policy.

    Error bars are the standard deviation over draws. A policy has one colour and one marker, a model one line style;
    where there is one policy alone, each model has a colour too.
    """
    figure = go.Figure(layout=_layout("share of the depth computed (%)", "perplexity", height=400))
    policies = list(dict.fromkeys(policy for evaluation in evaluations.values() for policy in evaluation.policies))
    values = []
    for number, (name, evaluation) in enumerate(evaluations.items()):
        for policy, results in evaluation.by_policy().items():
            values += [result.perplexity for result in results if math.isfinite(result.perplexity)]
            index = policies.index(policy)
            look = colour(number if len(policies) == 1 else index), symbol(index), dash(number)
            line = _depth_line(name, policy, results, look)
            if len(policies) == 1:
                line.name = label(name)
            elif len(evaluations) > 1:
                line.update(legendgroup=name, legendgrouptitle={"text": label(name)})
            figure.add_trace(line)
    if values and max(values) > LOG_RANGE * min(values) > 0:
        figure.update_yaxes(type="log")
    figure.update_xaxes(ticksuffix=" %", title={"text": "share of the depth computed"})
    if len(policies) > 1 and len(evaluations) > 1:
        beside = {"orientation": "v", "x": 1.02, "y": 1.0, "yanchor": "top", "groupclick": "toggleitem"}
        figure.update_layout(legend=beside, height=480)
    return figure


def _depth_line(name: str, policy: str, results: Sequence[DepthResult], look: tuple[str, str, str]) -> go.Scatter:
    """Return a model's line under a policy; `look` is its colour, marker and line style."""
    results = results[::-1]
    line_colour, marker, style = look
    stages = [f"{result.kept_stages} stages" if result.kept_stages is not None else "by layers" for result in results]
    return go.Scatter(
        name=label(policy),
        x=[result.share_computed * 100 for result in results],
        y=[result.perplexity for result in results],
        error_y={"type": "data", "array": [r.perplexity_std for r in results], "thickness": 1.2, "width": 4},
        mode="lines+markers",
        line={"color": line_colour, "width": 2, "dash": style},
        marker={"size": 8, "symbol": marker},
        customdata=[(text, result.samples, label(name)) for text, result in zip(stages, results, strict=True)],
        hovertemplate="%{x:.3~g} % of the depth (%{customdata[0]})<br>perplexity %{y:.4~g}"
        "<br>%{customdata[1]} batches<br>%{customdata[2]}<extra>%{fullData.name}</extra>",
    )


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
