"""Curves of a benchmark as a small SVG beside its table."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Curve:
    """Points from left to right; `spread` is drawn as a bar up and down. Curves of one `group` share a colour."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None
    group: str = ""
    dashed: bool = False


def write_curves(
    path: Path, curves: Sequence[Curve], *, title: str, x_label: str, y_label: str, y_limit: float | None = None
) -> None:
    """Draw curves over a logarithmic axis; equal curves make equal files. What is above `y_limit` is cut off."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    groups = list(dict.fromkeys(curve.group or curve.label for curve in curves))
    colours = mpl.colormaps["tab20" if len(groups) > 10 else "tab10"]
    for curve in curves:
        place = groups.index(curve.group or curve.label)
        line = "--" if curve.dashed else "-"
        look: dict[str, Any] = {
            "color": colours(place),
            "linestyle": line,
            "marker": "os^v"[place % 4],
            "markersize": 4,
            "capsize": 2,
        }
        axes.errorbar(curve.x, curve.y, yerr=curve.spread, label=curve.label, linewidth=1.3, **look)
    axes.set(title=title, xlabel=x_label, ylabel=y_label, yscale="log")
    axes.set_ylim(0.93 * min(value for curve in curves for value in curve.y), y_limit)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}" if y_limit is None else "")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", frameon=False)
    with mpl.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
