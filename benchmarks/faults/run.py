"""Kill, freeze and cut off processes of a run at random instants; see whether the others go on, how soon, how exactly.

    python benchmarks/faults/run.py [--kind KIND]... [--runs N] [--tries N] [--seed S]

Every run has 7 processes on this machine. benchmarks/README.md says what each kind does to them.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click
from goodput import goodput
from growth import growth
from islands import calm, cut_off
from lossy_run import NUM_NODES, SILENCE_S, STAGE_SIZES, make_experiment
from outcomes import Outcome, Row, summary
from planned_deaths import die_as_planned
from steady import steady
from strikes import STEPS, strike

from common.command import write_whole
from common.hosts import why_not
from common.table import machine, rows_table

HERE = Path(__file__).parent
CUTS = ("partition", "cut")
STEADY: dict[str, dict[str, Any]] = {
    "steady, local links": {},
    "steady, shaped links": {"shaped": True},
    "steady, shared-out state": {"backend": "zero_redundancy"},
}
MTBF_S = {"goodput": 60.0, "goodput, twice the losses": 30.0}
KINDS = (*STEPS, "planned", *CUTS, "calm", *STEADY, "growth", *MTBF_S)
IN_NAMESPACES = (*CUTS, "calm", "steady, shaped links")


class Sizes(NamedTuple):
    """How much of each kind is done."""

    runs: int
    tries: int
    blocks: int
    duration: float
    steps: int
    changes: int
    seed: int


def several(folder: Path, plan: Path, kind: str, sizes: Sizes) -> Row:
    """Make the runs of a kind, one after the other."""
    outcomes = []
    one_run = cut_off if kind in CUTS else die_as_planned if kind == "planned" else strike
    for number in range(sizes.seed, sizes.seed + sizes.runs):
        outcomes.append(one_run(folder, plan, kind, number))
        report(outcomes[-1])
    return summary(outcomes)


def report(outcome: Outcome) -> None:
    """Say what came of a run, with the last words of its processes where it failed."""
    words = outcome.last_words
    shown = range(len(words)) if not outcome.went_on else {loss.rank for loss in outcome.losses}
    click.echo(f"{'yes' if outcome.went_on else 'NO '}  {outcome.kind} {outcome.number}: {outcome.losses}")
    if not outcome.went_on:
        click.echo(f"    {outcome}"[:1500])
    for index in shown:
        click.echo(f"    {index}: {words[index][:300] if index < len(words) else ''}")


def measured(folder: Path, plan: Path, kind: str, sizes: Sizes, out: Path) -> dict[str, Any]:
    """Return the row of a kind, with where, when and beside what it was measured."""
    rows: Mapping[str, Callable[[], Row]] = {
        **{name: partial(several, folder, plan, name, sizes) for name in (*STEPS, "planned", *CUTS)},
        "calm": lambda: calm(folder, plan, sizes.tries, sizes.seed),
        "growth": lambda: growth(folder, plan, sizes.steps, sizes.changes),
        **{name: partial(goodput, folder, out, mtbf_s, sizes.duration, sizes.seed) for name, mtbf_s in MTBF_S.items()},
        **{name: partial(steady, folder, sizes.blocks, **given) for name, given in STEADY.items()},
    }
    before = os.getloadavg()[0]
    row = rows[kind]()
    load = {"load before": round(before, 1), "load after": round(os.getloadavg()[0], 1)}
    return {"row": row, "date": datetime.now(UTC).date().isoformat(), **load, **machine(HERE)}


@click.command()
@click.option("--kind", "kinds", type=click.Choice(KINDS), multiple=True, help="What happens; all where not given.")
@click.option("--runs", default=10, show_default=True, help="Runs of each kind, of two losses each.")
@click.option("--tries", default=100, show_default=True, help="Of `calm`: pauses, cuts and loads in its one run.")
@click.option("--blocks", default=10, show_default=True, help="Of `steady`: pairs of blocks of 60 steps.")
@click.option("--duration", default=600.0, show_default=True, help="Of `goodput`: seconds of losses, for each way.")
@click.option("--steps", default=2000, show_default=True, help="Of `growth`: steps of its one run.")
@click.option("--changes", default=20, show_default=True, help="Of `growth`: deaths, each followed by a return.")
@click.option("--seed", default=0, show_default=True, help="Number of the first run; it gives the random instants.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE, help="Folder of results.json and results.md.")
def main(kinds: tuple[str, ...], out: Path, **sizes: Any) -> None:
    """Make the runs; write results.json and results.md, where other kinds keep theirs."""
    from skippipe.planning.experiment_plan import plan_experiment

    known = out / "results.json"
    results: dict[str, Any] = json.loads(known.read_text()) if known.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        plan = folder / "given.plan.json"
        plan_experiment(make_experiment(folder, "planned", 1)).save(plan)
        for kind in kinds or KINDS:
            problem = why_not() if kind in IN_NAMESPACES else None
            if problem is not None:
                click.echo(f"{kind}: {problem}")
                continue
            results[kind] = measured(folder, plan, kind, Sizes(**sizes), out)
            write_whole(known, json.dumps({kind: results[kind] for kind in KINDS if kind in results}, indent=1) + "\n")
            write_whole(out / "results.md", page(results))
    click.echo((out / "results.md").read_text())


def page(results: Mapping[str, Any]) -> str:
    """Return the results as a page: a table for each kind."""
    lines = [f"# Lost processes: {NUM_NODES} processes, stages of {', '.join(map(str, STAGE_SIZES))} nodes", ""]
    lines += [f"Made by `run.py`; see [the guide](../README.md). `recovery.silence_s` is {SILENCE_S:g}.", ""]
    for kind in KINDS:
        if kind in results:
            lines += section(kind, results[kind])
    return "\n".join(lines).rstrip() + "\n"


def section(kind: str, result: Mapping[str, Any]) -> Sequence[str]:
    """Return the part of a kind."""
    load = f", load {result['load before']:g} to {result['load after']:g}" if "load before" in result else ""
    where = f"{result['cpu']}, {result['cores']} cores{load}"
    return [
        f"## {kind}",
        "",
        *rows_table([result["row"]]),
        f"- {where}, commit {result['commit']}, {result['date']}",
        "",
    ]


if __name__ == "__main__":
    main()
