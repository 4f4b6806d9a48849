"""Processes that are killed or stopped one after the other: `death`, `silence`, `pause`, `return` and `take-over`."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lossy_run import (
    SILENCE_S,
    Processes,
    lines_of,
    loss_difference,
    make_experiment,
    wait_for,
    wait_until_under_way,
)
from outcomes import Loss, Outcome

from skippipe.config.experiment import Experiment

STEPS = {"death": 40, "silence": 40, "pause": 40, "return": 500, "take-over": 500}
"""Of a run of each kind; a process that is started again needs seconds until it is ready, in which the others train."""
RETURNING = ("return", "take-over")
"""Kinds whose processes are started again."""
SECTIONS: dict[str, dict[str, Any]] = {
    "take-over": {"pipeline": {"stage_sizes": (1, 3, 3)}, "recovery": {"copy_interval": 1}}
}
"""What a kind changes of the experiment; it has a plan of its own then."""
LOSSES = 2
"""In each run: two nodes can be lost without a stage being left without one, if they are of different stages."""


def strike(folder: Path, plan: Path, kind: str, number: int) -> Outcome:
    """Train once, with losses at random instants."""
    experiment = make_experiment(folder, f"{kind}-{number}", STEPS[kind], **SECTIONS.get(kind, {}))
    outcome = Outcome(kind, number)
    if kind in SECTIONS:
        from skippipe.planning.experiment_plan import plan_experiment

        plan = folder / f"{kind}.plan.json"
        plan_experiment(experiment).save(plan)
    processes = Processes(experiment, plan)
    _strike_in_turn(experiment, plan, processes, outcome)
    outcome.exit_codes = processes.finish()
    outcome.leftover = sum(process.is_alive() for process in processes)
    outcome.last_words = [processes.last_words(index) for index in range(len(processes))]
    lost = {loss.rank for loss in outcome.losses} if kind != "pause" else set()
    code = 1 if kind == "silence" else -signal.SIGKILL
    outcome.expected_codes = [code if rank in lost else 0 for rank in range(len(processes))]
    if not outcome.error:
        steps = len(lines_of(experiment.run_path / "metrics.jsonl"))
        outcome.missing_steps = STEPS[kind] - steps
        outcome.loss_difference = loss_difference(folder, experiment, plan)
        if kind == "silence":
            outcome.late_writes = [
                words for loss in outcome.losses for words in processes.writes_after(loss.rank, loss.woken_s)
            ]
    return outcome


def holders(run_dir: Path, plan_path: Path) -> Iterator[tuple[str, int]]:
    """Yield the node that holds stage 0 alone, and its rank, each time as it is then."""
    from skippipe_scheduler.plan.validate import load_plan

    for _ in range(LOSSES):
        newest = [plan_path, *sorted((run_dir / "epochs").glob("*.json"))][-1]
        (node,) = load_plan(newest).stages[0].nodes
        yield node, load_plan(plan_path).rank_of[node]


def victims(
    plan_path: Path, generator: random.Random, count: int = LOSSES, *, with_first: bool = False
) -> Iterator[tuple[str, int]]:
    """Yield nodes of different stages and their ranks, in the order of their losses.

    Where `with_first`, one of them is rank 0, whose host has the store.
    """
    from skippipe_scheduler.plan.validate import load_plan

    plan = load_plan(plan_path)
    chosen = [generator.choice(stage.nodes) for stage in generator.sample(plan.stages, count)]
    if with_first:
        first = plan.nodes[0]
        others = [node for node in chosen if plan.stage_of[node] != plan.stage_of[first]]
        chosen = [first, *others[: count - 1]]
        generator.shuffle(chosen)
    for node in chosen:
        yield node, plan.rank_of[node]


def _strike_in_turn(experiment: Experiment, plan: Path, processes: Processes, outcome: Outcome) -> None:
    """Kill or stop processes at random instants and watch how the others go on."""
    run = wait_until_under_way(experiment, outcome.kind, outcome.number)
    if run is None:
        outcome.error = "no step was finished"
        return
    generator, metrics, events, deadline_s = run
    steps = STEPS[outcome.kind]
    takes_over = outcome.kind == "take-over"
    with_first = outcome.number % 2 == 0
    drawn = victims(plan, generator, with_first=with_first)
    for node, rank in holders(experiment.run_path, plan) if takes_over else drawn:
        number = len(lines_of(events))
        time.sleep(generator.uniform(0.0, 0.5))
        process = processes[rank].pid
        assert process is not None
        begun_s = time.monotonic()
        os.kill(process, signal.SIGSTOP if outcome.kind in ("silence", "pause") else signal.SIGKILL)
        loss = Loss(node, rank)
        outcome.losses.append(loss)
        if outcome.kind == "pause":
            time.sleep(SILENCE_S / 2)
            os.kill(process, signal.SIGCONT)
        elif not wait_for(events, number + 1, deadline_s):
            outcome.error = f"the loss of {node} was followed by no epoch"
            return
        else:
            loss.recovery_s = lines_of(events)[number]["total_s"]
        before = len(lines_of(metrics))
        if before < steps and not wait_for(metrics, before + 1, deadline_s):
            outcome.error = f"no step after the loss of {node}"
            return
        loss.next_step_s = time.monotonic() - begun_s
        if outcome.kind == "silence":
            loss.woken_s = time.monotonic()
            os.kill(process, signal.SIGCONT)
        if outcome.kind in RETURNING:
            begun_s = time.monotonic()
            processes.begin(rank)
            if not wait_for(events, number + 2, deadline_s):
                outcome.error = f"{node} did not come back"
                return
            loss.back_s, loss.taking_in_s = time.monotonic() - begun_s, lines_of(events)[number + 1]["total_s"]
