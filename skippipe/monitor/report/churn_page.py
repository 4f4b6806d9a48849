"""The page about a failure trace: throughput over time under each way to live with losses, and where the time went."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import plotly.graph_objects as go

from skippipe.monitor.report.page import Bar, Page, PageSection, Picture, Table, write_report
from skippipe.monitor.report.summary import NONE
from skippipe.monitor.report.theme import base_layout, colour, label
from skippipe.monitor.report.units import percent, seconds
from skippipe.planning.churn.comparison import ChurnComparison
from skippipe.planning.churn.failure_trace import FailureTrace
from skippipe.planning.churn.methods import Cause
from skippipe.planning.churn.replay import ReplayedRun, Stretch

MOST_INTERVALS = 600
"""Parts of the time over which the throughput is averaged."""
MOST_MARKS = 400
"""Losses that are marked; of more only the first are, and the caption says so."""


def write_churn_report(path: Path, comparison: ChurnComparison) -> None:
    """Write the page about a replayed trace; raises `SkipPipeError` where it cannot be written."""
    trace, runs = comparison.trace, comparison.runs
    facts = {f"Goodput, {name}": percent(run.goodput) for name, run in runs.items()}
    subtitle = (
        f"{len(comparison.plan.nodes)} nodes, {seconds(trace.duration_s)}, {trace.num_losses} losses, "
        f"{percent(trace.present_share(comparison.plan.nodes))} of the nodes there on the mean. "
        f"Plan {comparison.plan.hash}."
    )
    marked = "" if trace.num_losses <= MOST_MARKS else f" Only the first {MOST_MARKS} losses are marked."
    caption = (
        "Share of the undisturbed throughput, averaged over short times. Work that is later done again is in it. "
        f"Marks below: losses of nodes.{marked}"
    )
    sections = [
        PageSection("Throughput over time", "", [Picture(throughput_figure(runs, trace), caption)]),
        PageSection(
            "Where the time went",
            " ".join(f"{note.capitalize()}." for note in comparison.notes()),
            [],
            [causes_table(runs)],
        ),
    ]
    write_report(path, Page("A run that loses nodes", subtitle, facts, sections))


def throughput_figure(runs: Mapping[str, ReplayedRun], trace: FailureTrace) -> go.Figure:
    """Draw the throughput of each run over time, and the losses."""
    layout = base_layout(380) | {
        "xaxis": {"title": {"text": "time (s)"}, "zeroline": False},
        "yaxis": {"title": {"text": "share of the undisturbed throughput (%)"}, "rangemode": "tozero"},
    }
    figure = go.Figure(layout=layout)
    for index, (name, run) in enumerate(runs.items()):
        width_s = run.duration_s / MOST_INTERVALS
        shares = averaged(run.stretches, run.duration_s, MOST_INTERVALS)
        figure.add_trace(
            go.Scatter(
                name=label(name),
                x=[(number + 0.5) * width_s for number in range(MOST_INTERVALS)],
                y=[share * 100 for share in shares],
                mode="lines",
                line={"color": colour(index), "width": 1.6},
                hovertemplate="%{x:.4~s} s<br>%{y:.1f} %<extra>%{fullData.name}</extra>",
            )
        )
    losses = [change for change in trace.changes if change.lost][:MOST_MARKS]
    figure.add_trace(
        go.Scatter(
            name="losses",
            x=[change.time_s for change in losses],
            y=[0.0] * len(losses),
            mode="markers",
            marker={"symbol": "line-ns-open", "size": 9, "color": "#e05d8a"},
            text=[label(", ".join(sorted(change.lost)[:5])) for change in losses],
            hovertemplate="%{x:.4~s} s<br>%{text}<extra>lost</extra>",
        )
    )
    return figure


def averaged(stretches: Sequence[Stretch], duration_s: float, parts: int) -> list[float]:
    """Return the mean throughput over each of so many equal parts of the time."""
    width_s = duration_s / parts
    sums = [0.0] * parts
    for stretch in stretches:
        first, last = int(stretch.start_s / width_s), min(parts - 1, int(stretch.end_s / width_s))
        for part in range(first, last + 1):
            inside_s = min(stretch.end_s, (part + 1) * width_s) - max(stretch.start_s, part * width_s)
            sums[part] += stretch.throughput * max(0.0, inside_s) / width_s
    return sums


def causes_table(runs: Mapping[str, ReplayedRun]) -> Table:
    """Show how much of the time each cause took, a column a method."""
    rows: list[list[str | Bar]] = [
        ["useful: goodput", *(Bar(percent(run.goodput), run.goodput) for run in runs.values())]
    ]
    for cause in get_args(Cause):
        shares = [run.lost_s.get(cause, 0.0) / run.duration_s for run in runs.values()]
        if any(shares):
            rows.append([cause, *(Bar(percent(share), share) if share else NONE for share in shares)])
    rows.append(["times back to a checkpoint", *(str(run.rollbacks) for run in runs.values())])
    rows.append(["stages with other weights", *(str(run.changed_stages) for run in runs.values())])
    return Table("Shares of the time, by cause.", ("Time for", *runs), rows)
