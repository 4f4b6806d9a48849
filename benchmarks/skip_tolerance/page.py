"""The results of all recipes as a page: means and spreads over the seeds."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from setups import NORMALS
from sizes import SIZES

from common.figure import Curve, write_curves
from common.table import QUICK

Result = Mapping[str, Any]
ALIKE = 0.06
"""Compute is called equal where it differs by no more than this share."""


def page(results: Sequence[Result], order: Sequence[str]) -> str:
    """Return the page in Markdown: a table for each size, one row a recipe, in `order`."""
    lines = [
        "# Models trained to work with stages left out",
        "",
        "Made by `run.py`; see [the guide](../README.md).",
        "",
    ]
    if any(result["quick"] for result in results):
        lines += [QUICK, ""]
    lines += [
        "Perplexity of held-out bytes, over every choice of as many stages: mean over the seeds, and their standard",
        "deviation. Compute is that of the layers, relative to normal training. The last columns are ratios of",
        "perplexities, under the same seed, then averaged; normal training is the one with the best learning rate.",
        "",
    ]
    for size in SIZES:
        if same_size := [result for result in results if result["size"] == size]:
            lines += [*_section(size, same_size, order), ""]
    return "\n".join([*lines, *_places(results)]) + "\n"


def figure_of(size: str) -> str:
    """Return the name of a size's figure."""
    return f"results-{size}.svg"


def _section(size: str, results: Sequence[Result], order: Sequence[str]) -> list[str]:
    rows = _by_recipe(results, order)
    layers = sorted({int(depth) for result in results for depth in result["perplexity"]}, reverse=True)
    titles = ["recipe", "steps", "compute", *(f"{depth} layers" for depth in layers)]
    titles += ["full depth, to normal at equal tokens", "to normal at equal compute", "half to own full depth", "seeds"]
    return [
        f"## {size.removesuffix('-prose')} parameters, {'prose' if SIZES[size].prose else 'code'}",
        "",
        _line(titles),
        _line(["---"] * len(titles)),
        *(_line(_cells(name, found, rows, layers)) for name, found in rows.items()),
        "",
        f"![Perplexity by number of layers]({figure_of(size)})",
    ]


def draw(path: Path, results: Sequence[Result], order: Sequence[str]) -> None:
    """Draw every recipe's perplexities by number of layers: means over the seeds, and their standard deviation."""
    curves = []
    for name, found in _by_recipe(results, order).items():
        layers = sorted(found[0]["perplexity"], key=int)
        values = [[_at(result, depth) for result in found] for depth in layers]
        spread = [statistics.stdev(each) for each in values] if len(found) > 1 else None
        curves.append(Curve(name, [*map(int, layers)], [*map(statistics.fmean, values)], spread))
    title = "Recipes: perplexity with stages left out"
    write_curves(path, curves, title=title, x_label="layers that run", y_label="perplexity of held-out bytes")


def _by_recipe(results: Sequence[Result], order: Sequence[str]) -> dict[str, list[Result]]:
    rows = {name: [result for result in results if result["recipe"] == name] for name in order}
    return {name: found for name, found in rows.items() if found}


def _cells(
    name: str, found: Sequence[Result], rows: Mapping[str, Sequence[Result]], layers: Sequence[int]
) -> list[str]:
    compute, deepest = found[0]["compute"], str(layers[0])
    normal = {name: rows[name] for name in NORMALS if name in rows}
    equal_tokens = [name for name, others in normal.items() if others[0]["steps"] == found[0]["steps"]]
    alike = [name for name, others in normal.items() if abs(compute / others[0]["compute"] - 1) <= ALIKE]
    half = str(layers[0] // 2)
    return [
        name,
        str(found[0]["steps"]),
        f"{compute:.2f}",
        *(
            _spread([_at(result, str(depth)) for result in found if str(depth) in result["perplexity"]])
            for depth in layers
        ),
        *(_ratio(found, [rows[name] for name in names], deepest) for names in (equal_tokens, alike)),
        _spread(
            [
                _at(result, half) / _at(result, deepest)
                for result in found
                if {half, deepest} <= result["perplexity"].keys()
            ]
        ),
        str(len(found)),
    ]


def _ratio(found: Sequence[Result], normal: Sequence[Sequence[Result]], depth: str) -> str:
    """Return the ratio to the best of some normal trainings, under the same seed; a shallower model's is that of its
    own whole depth.

    The best is that of the seeds that all of them have: the others would be compared with other data.
    """
    if not normal:
        return ""
    shared = set.intersection(*({result["seed"] for result in results} for results in normal))
    tuned = min(
        normal,
        key=lambda results: statistics.fmean(
            _at(result, depth) for result in results if result["seed"] in shared or not shared
        ),
    )
    by_seed = {result["seed"]: _at(result, depth) for result in tuned}
    return _spread([_deepest(result) / by_seed[result["seed"]] for result in found if result["seed"] in by_seed])


def _at(result: Result, depth: str) -> float:
    return float(result["perplexity"][depth]["mean"])


def _deepest(result: Result) -> float:
    return _at(result, max(result["perplexity"], key=int))


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def _places(results: Sequence[Result]) -> list[str]:
    """Return where and when each training was measured."""
    places = sorted(
        {f"{result['cpu']}, {result['cores']} cores, commit {result['commit']}, {result['date']}" for result in results}
    )
    total_h = sum(result["training_s"] + result["evaluation_s"] for result in results) / 3600
    return [*(f"- {place}" for place in places), f"- {len(results)} trainings, {total_h:.1f} hours of one core"]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
