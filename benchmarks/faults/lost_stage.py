"""Kill the only node of a stage, go on in each way of `recovery.lost_stage`, and compare perplexity some steps later.

    python benchmarks/faults/lost_stage.py [--runs N] [--later STEPS] [--seed S]

Every run has 7 processes on this machine, which hold 4 stages of equal layers. One node alone holds the third; it is
killed with SIGKILL at a random instant and does not come back. Validation perplexity is compared with that of a run
that nothing happens to, at the same step.
"""

import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click
from lossy_run import LIMIT_S, NUM_NODES, Processes, lines_of, wait_for

from common.command import write_whole
from common.small_experiment import small_experiment
from common.table import machine, rows_table
from skippipe.config.experiment import Experiment
from skippipe.monitor.metrics import Metric
from skippipe.monitor.metrics_file import read_metrics

HERE = Path(__file__).parent
TEXT = HERE.parents[1] / "docs" / "*.md"
"""On what is trained: text from which there is more to learn than the runs have steps for."""
STAGE_SIZES = (2, 2, 1, 2)
LOST = 2
"""The stage that one node alone holds, between two others."""
INTERVAL = 20
"""Steps from one validation, and from one copy, to the next."""
BEFORE = 5
"""Validations before the loss."""
SAVED = 50
"""Steps from one checkpoint to the next."""
UNDISTURBED = "undisturbed"
WAYS: dict[str, tuple[str, int]] = {
    UNDISTURBED: ("stop", INTERVAL),
    "copy of every step": ("copy", 1),
    "copy": ("copy", INTERVAL),
    "routes_around": ("routes_around", INTERVAL),
    "rebuild": ("rebuild", INTERVAL),
    "checkpoint": ("checkpoint", INTERVAL),
}
"""Of each way `recovery.lost_stage` and `recovery.copy_interval`."""


@dataclass
class LostStageRun:
    """What came of one run."""

    way: str
    number: int
    perplexity: float | None = None
    """At the last step."""
    behind: int | None = None
    """How many steps the stage's state was behind."""
    next_step_s: float | None = None
    """From the kill until the next step was finished."""
    iteration_s: float | None = None
    """Median of the steps before the loss."""
    error: str = ""


def make_experiment(folder: Path, way: str, number: int, later: int) -> Experiment:
    """Return an experiment on 7 nodes with 4 stages."""
    lost_stage, copy_interval = WAYS[way]
    experiment = small_experiment(
        folder,
        f"{way.replace(' ', '-')}-{number}",
        NUM_NODES,
        pipeline={"num_stages": 4, "stage_sizes": STAGE_SIZES, "planner": {"max_evaluations": 200}},
        data={"paths": [str(TEXT)]},
        training={"max_steps": BEFORE * INTERVAL + later, "num_microbatches": 6, "sequence_length": 64},
        optimizer={"lr": 3e-3},
        lr_scheduler={"warmup_steps": 10},
        evaluation={"interval": INTERVAL, "batches": 4},
        checkpoint={"interval": SAVED},
        comm={"timeout_s": 60.0},
        recovery={
            "enabled": True,
            "silence_s": 3.0,
            "planning_s": 0.2,
            "lost_stage": lost_stage,
            "copy_interval": copy_interval,
        },
    )
    options = dict(experiment.model.options or {}) | {"num_hidden_layers": 8}
    return experiment.model_copy(update={"model": experiment.model.model_copy(update={"options": options})})


def run(folder: Path, plan: Path, way: str, number: int, later: int) -> LostStageRun:
    """Train once, with a loss unless it is the undisturbed run."""
    from skippipe_scheduler.plan.validate import load_plan

    experiment, outcome = make_experiment(folder, way, number, later), LostStageRun(way, number)
    processes = Processes(experiment, plan)
    if way != UNDISTURBED:
        loaded = load_plan(plan)
        strike(experiment, processes[loaded.rank_of[loaded.stages[LOST].nodes[0]]].pid, outcome)
    deadline_s = time.monotonic() + LIMIT_S + later
    for process in processes:
        process.join(max(0.1, deadline_s - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
            outcome.error = outcome.error or "a process did not end"
    entries = read_metrics(experiment.run_path / "metrics.jsonl")
    if not outcome.error and len(entries) < experiment.training.max_steps:
        outcome.error = f"ended after {len(entries)} steps"
    if not outcome.error:
        outcome.perplexity = entries[-1][Metric.VALIDATION_PERPLEXITY]
        outcome.iteration_s = statistics.median(entry[Metric.ITERATION_S] for entry in entries[: BEFORE * INTERVAL])
        events = lines_of(experiment.run_path / "events.jsonl")
        restored = [(event["step"], each) for event in events for each in event["restored"]]
        outcome.behind = next((step - each["of_step"] for step, each in restored), None)
    return outcome


def strike(experiment: Experiment, process: int | None, outcome: LostStageRun) -> None:
    """Kill a process at a random instant in the steps behind the last validation before the loss."""
    generator = random.Random(f"lost stage/{outcome.number}")
    metrics, events = experiment.run_path / "metrics.jsonl", experiment.run_path / "events.jsonl"
    deadline_s = time.monotonic() + LIMIT_S
    if process is None or not wait_for(metrics, BEFORE * INTERVAL - generator.randrange(INTERVAL), deadline_s):
        outcome.error = "the steps before the loss were not finished"
        return
    time.sleep(generator.uniform(0.0, 0.2))
    begun_s = time.monotonic()
    os.kill(process, signal.SIGKILL)
    if not wait_for(events, 1, deadline_s) or not wait_for(metrics, len(lines_of(metrics)) + 1, deadline_s):
        outcome.error = "no step after the loss"
        return
    outcome.next_step_s = time.monotonic() - begun_s


def summary(way: str, outcomes: Sequence[LostStageRun], undisturbed: float) -> dict[str, Any]:
    """Return what all runs of a way together show."""
    good = [outcome for outcome in outcomes if outcome.perplexity is not None]
    perplexities = [outcome.perplexity or 0.0 for outcome in good]
    return {
        "way": way,
        "runs": len(outcomes),
        "went on to the end": len(good),
        "perplexity": _range(perplexities, 3),
        "beside the undisturbed run, %": _range([100 * (value / undisturbed - 1) for value in perplexities], 1),
        "steps behind": _range([outcome.behind for outcome in good], 0),
        "next finished step, s": _range([outcome.next_step_s for outcome in good], 2),
        "iteration before the loss, s": _range([outcome.iteration_s for outcome in good], 3),
        "failed": [str(outcome) for outcome in outcomes if outcome.error],
    }


def _range(values: Sequence[float | None], digits: int) -> str:
    """Return median and extremes."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    middle = f"{statistics.median(known):.{digits}f}"
    return middle if len(known) == 1 else f"{middle} ({min(known):.{digits}f} to {max(known):.{digits}f})"


@click.command()
@click.option("--runs", default=10, show_default=True, help="Losses for each way.")
@click.option("--later", default=200, show_default=True, help="Steps behind the loss after which runs are compared.")
@click.option("--seed", default=0, show_default=True, help="Number of the first run; it gives the random instants.")
def main(runs: int, later: int, seed: int) -> None:
    """Run all; write lost-stage.json and lost-stage.md beside this file, anew after each round of all ways."""
    from skippipe.planning.experiment_plan import plan_experiment

    outcomes: dict[str, list[LostStageRun]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        plan = folder / "given.plan.json"
        plan_experiment(make_experiment(folder, UNDISTURBED, 0, later)).save(plan)
        for number in range(seed, seed + runs):
            for way in WAYS:
                if way == UNDISTURBED and outcomes[way]:
                    continue
                outcomes[way].append(run(folder, plan, way, number, later))
                click.echo(str(outcomes[way][-1]))
            write_results(outcomes, later)


def write_results(outcomes: Mapping[str, Sequence[LostStageRun]], later: int) -> None:
    """Write what all runs of all ways have shown so far."""
    undisturbed = outcomes[UNDISTURBED][0]
    if undisturbed.perplexity is None:
        raise SystemExit(f"the undisturbed run failed: {undisturbed.error}")
    rows = [summary(way, found, undisturbed.perplexity) for way, found in outcomes.items()]
    result = {"rows": rows, "later": later, "date": datetime.now(UTC).date().isoformat(), **machine(HERE)}
    write_whole(HERE / "lost-stage.json", json.dumps(result, indent=1) + "\n")
    write_whole(HERE / "lost-stage.md", page(result))


def page(result: dict[str, Any]) -> str:
    """Return the result as a page."""
    where = f"{result['cpu']}, {result['cores']} cores, commit {result['commit']}, {result['date']}"
    title = f"# A stage that nobody holds: {NUM_NODES} processes, stages of {', '.join(map(str, STAGE_SIZES))} nodes"
    about = (
        f"Made by `lost_stage.py`; see [the guide](../README.md). The only node of stage {LOST} is lost after about "
        f"{BEFORE * INTERVAL - INTERVAL // 2} steps and does not come back; perplexity is that of the validation text "
        f"{result['later']} steps later. Copies are made every {INTERVAL} steps where nothing else is said, and "
        f"checkpoints every {SAVED}. With a copy of every step nothing is lost: what differs there is that fewer nodes "
        "have other routes. Median, and in brackets the extremes."
    )
    return "\n".join([title, "", about, "", *rows_table(result["rows"]), f"- {where}"]) + "\n"


if __name__ == "__main__":
    main()
