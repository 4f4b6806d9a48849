"""Processes that are killed or stopped one after the other: `death`, `silence`, `pause` and `return`."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from lossy_run import LIMIT_S, SILENCE_S, Processes, lines_of, loss_difference, make_experiment, wait_for
from outcomes import Loss, Outcome

from skippipe.config.experiment import Experiment

STEPS = {"death": 40, "silence": 40, "pause": 40, "return": 500}
"""Of a run of each kind; a process that is started again needs seconds until it is ready, in which the others train."""
LOSSES = 2
"""In each run: two nodes can be lost without a stage being left without one, if they are of different stages."""


def strike(folder: Path, plan: Path, kind: str, number: int) -> Outcome:
    """Train once, with losses at random instants."""
    experiment, outcome = make_experiment(folder, f"{kind}-{number}", STEPS[kind]), Outcome(kind, number)
    processes = Processes(experiment, plan)
    _strike_in_turn(experiment, plan, processes, outcome)
    outcome.exit_codes = processes.finish()
    outcome.leftover = sum(process.is_alive() for process in processes)
    outcome.last_words = [processes.last_words(index) for index in range(len(processes))]
    lost = {loss.rank for loss in outcome.losses} if kind != "pause" else set()
    code = {"death": -signal.SIGKILL, "return": -signal.SIGKILL, "silence": 1}.get(kind)
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


def victims(plan_path: Path, generator: random.Random, count: int = LOSSES) -> Iterator[tuple[str, int]]:
    """Yield nodes of different stages and their ranks, in the order of their losses."""
    from skippipe_scheduler.plan.validate import load_plan

    plan = load_plan(plan_path)
    for stage in generator.sample(plan.stages, count):
        node = generator.choice(stage.nodes)
        yield node, plan.rank_of[node]


def _strike_in_turn(experiment: Experiment, plan: Path, processes: Processes, outcome: Outcome) -> None:
    """Kill or stop processes at random instants and watch how the others go on."""
    generator = random.Random(f"{outcome.kind}/{outcome.number}")
    metrics, events = experiment.run_path / "metrics.jsonl", experiment.run_path / "events.jsonl"
    deadline_s = time.monotonic() + LIMIT_S
    if not wait_for(metrics, 2, deadline_s):
        outcome.error = "no step was finished"
        return
    steps = STEPS[outcome.kind]
    for node, rank in victims(plan, generator):
        number = len(lines_of(events))
        time.sleep(generator.uniform(0.0, 0.5))
        process = processes[rank].pid
        assert process is not None
        begun_s = time.monotonic()
        os.kill(process, signal.SIGKILL if outcome.kind in ("death", "return") else signal.SIGSTOP)
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
        if outcome.kind == "return":
            begun_s = time.monotonic()
            processes.begin(rank)
            if not wait_for(events, number + 2, deadline_s):
                outcome.error = f"{node} did not come back"
                return
            loss.back_s, loss.taking_in_s = time.monotonic() - begun_s, lines_of(events)[number + 1]["total_s"]
