"""Two processes that die at planned points: one in a step, and one in the recovery from that death."""

import random
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossy_run import Processes, lines_of, loss_difference, make_experiment
from outcomes import Loss, Outcome

if TYPE_CHECKING:
    from skippipe_scheduler.plan.plan import Plan

STEPS = 40
POINTS = ("BEGIN", "FORWARD", "BACKWARD", "REDUCE", "STEP", "UPDATED", "VALIDATION", "CHECKPOINT")
RECOVERY_POINTS = ("VOTE", "DECISION", "AGREED", "GROUPS", "EPOCH")
"""Their number and that of `POINTS` have no divisor in common: 40 runs have every pair."""
FATAL_STEPS = {"VALIDATION": 14, "CHECKPOINT": 15}
"""In which it is validated and saved; the other deaths are in one of the steps from `FIRST_STEP` on."""
FIRST_STEP = 8


def die_as_planned(folder: Path, plan_path: Path, kind: str, number: int) -> Outcome:
    """Train once, with the points of this number."""
    from skippipe_scheduler.plan.validate import load_plan

    plan, generator = load_plan(plan_path), random.Random(f"{kind}/{number}")
    point, in_recovery = POINTS[number % len(POINTS)], RECOVERY_POINTS[number % len(RECOVERY_POINTS)]
    step = FATAL_STEPS.get(point, FIRST_STEP + generator.randrange(STEPS - 2 * FIRST_STEP))
    first, second = _victims(plan, in_recovery, generator)
    # Whether the others have taken the step by then is a matter of microseconds, so they go on with one of two steps.
    faults: list[dict[str, Any]] = [
        {"node": second, "step": next_step, "at": in_recovery} for next_step in (step, step + 1)
    ]
    faults.append({"node": first, "step": step, "at": point})
    experiment = make_experiment(folder, f"{kind}-{number}", STEPS, emulation={"faults": faults})
    outcome = Outcome(f"{kind} at {point} and {in_recovery}", number)
    outcome.losses = [Loss(node, plan.rank_of[node]) for node in (first, second)]
    processes = Processes(experiment, plan_path)
    outcome.exit_codes = processes.finish()
    outcome.leftover = sum(process.is_alive() for process in processes)
    outcome.last_words = [processes.last_words(index) for index in range(len(processes))]
    lost = {loss.rank for loss in outcome.losses}
    outcome.expected_codes = [-signal.SIGKILL if rank in lost else 0 for rank in range(len(processes))]
    events = lines_of(experiment.run_path / "events.jsonl")
    for loss in outcome.losses:
        loss.recovery_s = next((event["total_s"] for event in events if loss.node in event["lost"]), None)
    outcome.missing_steps = STEPS - len(lines_of(experiment.run_path / "metrics.jsonl"))
    outcome.loss_difference = loss_difference(folder, experiment, plan_path)
    return outcome


def _victims(plan: "Plan", in_recovery: str, generator: random.Random) -> tuple[str, str]:
    """Return two nodes of different stages; the second one decides where it is to die of that."""
    stages = list(plan.stages)
    own = plan.stage_of[plan.nodes[0]] if in_recovery == "DECISION" else generator.randrange(len(stages))
    second = plan.nodes[0] if in_recovery == "DECISION" else generator.choice(stages[own].nodes)
    others = [node for index, stage in enumerate(stages) if index != own for node in stage.nodes if plan.order[node]]
    return generator.choice(others), second
