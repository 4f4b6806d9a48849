"""A process dies in the middle of a run: the others go on from the same step, exactly."""

import json
import signal
from pathlib import Path

import pytest
from processes import ForkedProcess, free_port, preloaded, run_skippipe
from random_plans import random_plan
from training_runs import CLUSTER, losses, make_experiment, train_alone, write_inputs

from skippipe.errors import CommunicationError
from skippipe.training.recovery.progress import ProgressReport, Settlement, settle
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.validate import load_plan

WORLD_SIZE = 4
STEPS = 6
FATAL_STEP = 4
PLAN_SEED = 1


def replicated_plan() -> Plan:
    """Return a plan of 4 nodes in which each of the 2 stages has 2 replicas."""
    plan = random_plan(
        PLAN_SEED, num_nodes=WORLD_SIZE, num_stages=2, route_length=2, num_microbatches=4, layers_per_stage=3
    )
    assert [len(stage.nodes) for stage in plan.stages] == [2, 2]
    return plan


def run_with_death(folder: Path, victim: str, point: str) -> tuple[list[tuple[int | None, str]], Path]:
    """Train on 4 processes, of which one dies; return exit codes and outputs, and the run."""
    (folder / "cluster.yaml").write_text(CLUSTER)
    experiment = make_experiment(
        folder,
        "lossy",
        training={"max_steps": STEPS},
        checkpoint={"interval": 4},
        evaluation={"interval": 4},
        recovery={"enabled": True, "silence_s": 5, "planning_s": 0},
        emulation={"faults": [{"node": victim, "step": FATAL_STEP, "at": point}]},
    )
    arguments = write_inputs(experiment, replicated_plan(), folder)
    port, context = free_port(), preloaded()
    ranks = []
    for rank in range(WORLD_SIZE):
        place = {"RANK": rank, "WORLD_SIZE": WORLD_SIZE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        output = folder / f"lossy-{rank}.txt"
        environment = {key: str(value) for key, value in place.items()}
        process = context.Process(target=run_skippipe, args=(["train", *arguments], output, environment))
        process.start()
        ranks.append(ForkedProcess(process, output))
    return [rank.finish(100) for rank in ranks], experiment.run_path


def reference_losses(folder: Path, after: Plan) -> list[float]:
    """Return the losses of one process that walks the old plan before the death and the new one after it."""
    before = make_experiment(
        folder, "reference", training={"max_steps": STEPS}, checkpoint={"interval": FATAL_STEP - 1}
    )
    train_alone(before, replicated_plan())
    first = losses(before.run_path)[: FATAL_STEP - 1]
    checkpoint = before.run_path / "checkpoints" / f"step-{FATAL_STEP - 1:08d}"
    later = make_experiment(
        folder, "later", training={"max_steps": STEPS}, checkpoint={"resume": str(checkpoint), "interval": 0}
    )
    train_alone(later, after)
    return first + losses_from(later.run_path)


def losses_from(run_dir: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "point"), [("node-0", "BACKWARD"), pytest.param("node-2", "STEP", marks=pytest.mark.extended)]
)
def test_others_go_on_where_a_process_died(tmp_path: Path, victim: str, point: str) -> None:
    results, run_dir = run_with_death(tmp_path, victim, point)
    dead = int(victim.removeprefix("node-"))
    codes = [code for code, _ in results]
    assert codes == [-signal.SIGKILL if rank == dead else 0 for rank in range(WORLD_SIZE)], results
    after = load_plan(run_dir / "epochs" / "epoch-0001.plan.json")
    assert set(after.nodes) == set(replicated_plan().nodes) - {victim}
    event = json.loads((run_dir / "events.jsonl").read_text())
    assert event["lost"] == [victim]
    assert event["recovery_s"] < 10
    assert event["step"] == FATAL_STEP - 1
    found = losses(run_dir)
    assert len(found) == STEPS
    assert found == pytest.approx(reference_losses(tmp_path, after), abs=1e-5)


def report(step: int, contributed: int, *, left: bool = False) -> ProgressReport:
    return ProgressReport(step=step, contributed=contributed, totals=(float(step),), work_is_left=left)


def test_interrupted_step_begins_again_where_nobody_has_taken_it() -> None:
    reports = {"a": report(3, 4), "b": report(3, 3)}
    assert settle(reports) == Settlement(3, (3.0,), work_is_left=False)


def test_step_that_one_has_taken_is_taken_by_all() -> None:
    reports = {"a": report(3, 4), "b": report(4, 4)}
    assert settle(reports) == Settlement(4, (4.0,), work_is_left=True)


def test_work_behind_a_step_is_done_again_where_one_has_not_finished_it() -> None:
    reports = {"a": report(4, 4), "b": report(4, 4, left=True)}
    assert settle(reports).work_is_left


def test_a_process_that_cannot_follow_ends_the_run() -> None:
    with pytest.raises(CommunicationError, match="b is at step 2"):
        settle({"a": report(4, 4), "b": report(2, 3)})
