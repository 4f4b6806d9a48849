"""A node or link turns slower in the middle of a run, and fast again: what another plan makes of it, and of noise.

    python benchmarks/faults/slow_node.py [--kind KIND]... [--factor F] [--seed S]

Seven processes train with `recovery.replan`. Tasks take the times of a cluster file; with "real tasks" they take what
they take beside each other on this machine.
"""

import json
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click
from lossy_run import NUM_NODES, STAGE_SIZES, Processes, loss_difference, make_experiment

from common.command import write_whole
from common.table import machine, rows_table
from skippipe.config.experiment import Experiment
from skippipe.monitor.metrics import Metric
from skippipe.monitor.metrics_file import read_metrics
from skippipe.monitor.run_events import MembershipChange, read_changes
from skippipe_scheduler.plan.plan import Plan

HERE = Path(__file__).parent
CHANGES: Final = ("slow node", "slow link")
KINDS: Final = (*CHANGES, "jitter", "real tasks")
SLOW_AT, FAST_AT, LAST = 10, 40, 75
"""Steps: the first one of the slow node, the first one when it is fast again, and the last one."""
NOISY_STEPS = {"jitter": 90, "real tasks": 400}
JITTER_SIGMA = 0.3
CLUSTER = f"""
format: skippipe.cluster/1
name: seven
nodes:
  - {{name: node, count: {NUM_NODES}, region: here, forward_s: 0.03, backward_s: 0.06, loss_s: 0.01, max_in_flight: 12}}
links:
  contention: none
"""
LINK, SLOW_LINK = 1.0, 0.005
"""Gbit/s of all links; with the latter, a message takes some 30 ms, as long as a forward."""


def experiment_of(folder: Path, kind: str, factor: float, seed: int, slow: Sequence[str] = ()) -> Experiment:
    """Return the experiment of a kind; `slow` is the node that changes its pace, or the two ends of the link."""
    steps = NOISY_STEPS.get(kind, LAST)
    replan: dict[str, Any] = {"enabled": True}
    emulation: dict[str, Any] = {"compute": kind != "real tasks", "links": kind == "slow link", "seed": seed}
    if kind in CHANGES:
        replan |= {"window": 5, "pause": 10, "search_s": 2.0, "niceness": 0}
        changes = ((SLOW_AT, factor), (FAST_AT, 1.0))
        what = dict(zip(("node", "to"), slow, strict=False))
        emulation["paces"] = [{**what, "step": step, "factor": pace} for step, pace in changes if slow]
    elif kind == "jitter":
        emulation["jitter_sigma"] = JITTER_SIGMA
    made = make_experiment(
        folder,
        kind.replace(" ", "-"),
        steps,
        checkpoint={"interval": 0},
        evaluation={"interval": 0},
        training={"max_steps": steps, "num_microbatches": 12},
        recovery={"enabled": True, "plans_ahead": False, "silence_s": 20.0, "replan": replan},
        emulation=emulation,
    )
    link = SLOW_LINK if kind == "slow link" else LINK
    (folder / "cluster.yaml").write_text(f"{CLUSTER}  within_region: {{latency_ms: 2, gbit_per_s: {link}}}\n")
    return made


def train(folder: Path, kind: str, factor: float, seed: int) -> dict[str, Any]:
    """Train with seven processes; return the row of the table."""
    from skippipe.planning.experiment_plan import plan_experiment

    plan = plan_experiment(experiment_of(folder, kind, factor, seed))
    path = folder / "given.plan.json"
    plan.save(path)
    slow = _busiest_link(plan) if kind == "slow link" else plan.stages[1].nodes[:1]
    experiment = experiment_of(folder, kind, factor, seed, slow)
    codes = Processes(experiment, path).finish()
    changes = [change for change in read_changes(experiment.run_path) if change.pace_change is not None]
    for change in changes:
        click.echo(str(change))
    entries = read_metrics(experiment.run_path / "metrics.jsonl")
    times_s = {int(entry["step"]): float(entry[Metric.ITERATION_S]) for entry in entries}
    row: dict[str, Any] = {
        "kind": kind,
        "steps": len(times_s),
        "plans that replaced another": len(changes),
        **(_phases(times_s, changes) if kind in CHANGES else {}),
        "largest difference of a loss": f"{loss_difference(folder, experiment, path):.1e}",
        "failed": [] if not any(codes) else [f"exit codes {codes}"],
    }
    return row


def _busiest_link(plan: Plan) -> Sequence[str]:
    """Return the ends of the link that most microbatches cross."""
    crossed = Counter(
        frozenset(hop) for microbatch in plan.microbatches for hop in pairwise(microbatch.route) if len({*hop}) == 2
    )
    return sorted(crossed.most_common(1)[0][0])


def _phases(times_s: dict[int, float], changes: Sequence[MembershipChange]) -> dict[str, Any]:
    """Return medians of iterations before and after each change; the step after one is not counted."""
    borders = [change.step for change in changes]
    first = next((step for step in borders if step >= SLOW_AT), FAST_AT)
    second = next((step for step in borders if step >= FAST_AT), LAST)
    ranges = {
        "iteration before, s": (3, SLOW_AT),
        "slow, old plan": (SLOW_AT, first + 1),
        "slow, new plan": (first + 2, FAST_AT),
        "fast again, that plan": (FAST_AT, second + 1),
        "fast again, next plan": (second + 2, LAST + 1),
    }
    medians = {
        name: _median_s([times_s[step] for step in range(*ends) if step in times_s]) for name, ends in ranges.items()
    }
    before, after = medians["slow, old plan"], medians["slow, new plan"]
    ratio = round(after / before, 2) if before and after else None
    said = [change.pace_change.time_ratio for change in changes if change.pace_change is not None]
    return medians | {
        "new / old": ratio,
        "as said": ", ".join(f"{value:.2f}" for value in said),
        "steps until the new plan": first + 1 - SLOW_AT,
        "until the next": second + 1 - FAST_AT,
    }


def _median_s(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 3) if values else None


@click.command()
@click.option("--kind", "kinds", multiple=True, type=click.Choice(KINDS), help="What to run; all where not given.")
@click.option("--factor", default=3.0, show_default=True, help="How many times slower the node or link turns.")
@click.option("--seed", default=0, show_default=True, help="Seed of the jitter.")
def main(kinds: tuple[str, ...], factor: float, seed: int) -> None:
    """Run all and write slow-node.json and slow-node.md beside this file; kinds that are not run stay as they were."""
    path = HERE / "slow-node.json"
    known = {row["kind"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    for kind in kinds or KINDS:
        with tempfile.TemporaryDirectory() as place:
            known[kind] = train(Path(place), kind, factor, seed)
        click.echo(json.dumps(known[kind]))
    rows = [known[kind] for kind in KINDS if kind in known]
    result = {"rows": rows, "factor": factor, "date": datetime.now(UTC).date().isoformat(), **machine(HERE)}
    write_whole(path, json.dumps(result, indent=1) + "\n")
    write_whole(HERE / "slow-node.md", page(result))


def page(result: dict[str, Any]) -> str:
    """Return the result as a page."""
    where = f"{result['cpu']}, {result['cores']} cores, commit {result['commit']}, {result['date']}"
    sizes = ", ".join(map(str, STAGE_SIZES))
    about = (
        f"Made by `slow_node.py`; see [the guide](../README.md). {NUM_NODES} processes, stages of {sizes} nodes. In "
        f'"slow node" one of stage 1 turns {result["factor"]:g} times slower at step {SLOW_AT}, and fast again at step '
        f'{FAST_AT}. In "slow link" the link that most microbatches cross does so; a plan that leaves it cannot know '
        "that it is fast again. In the others nothing happens but noise, with the defaults of `recovery.replan`: each "
        f"task takes a lognormal factor of sigma {JITTER_SIGMA}, or processes with real tasks share the cores. Medians."
    )
    lines = ["# A node or link that turns slow, and noise", "", about, ""]
    for row in result["rows"]:
        lines += rows_table([row])
    return "\n".join([*lines, f"- {where}"]) + "\n"


if __name__ == "__main__":
    main()
