"""Real ranks over gloo: the losses of one process, a stop by SIGTERM, a kill in the middle of a checkpoint."""

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from processes import finish
from training_runs import (
    CLUSTER,
    WORLD_SIZE,
    losses,
    make_experiment,
    ranks_plan,
    start_ranks,
    start_ranks_in_a_long_step,
    start_ranks_that_die_while_saving,
    start_torchrun,
    train_alone,
    train_on_ranks,
    write_inputs,
)

from skippipe.checkpoint.reader import complete_checkpoints
from skippipe.config.experiment_file import load_run
from skippipe.monitor.metrics_file import read_metrics
from skippipe.planning.measured_for import experiment_measured_for
from skippipe_scheduler.plan.recost import recost
from skippipe_scheduler.plan.simulate import simulate
from skippipe_scheduler.plan.validate import load_plan
from skippipe_scheduler.problem.cluster import load_cluster

STEPS = 20
LONG = {"max_steps": STEPS}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(170)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of one process, which is the reference."""
    path = tmp_path_factory.mktemp("processes")
    train_alone(make_experiment(path, "alone", training=LONG), ranks_plan())
    return path


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The same run on several ranks, never stopped."""
    experiment = make_experiment(folder, "whole", training=LONG)
    (folder / "cluster.yaml").write_text(CLUSTER.replace("count: 4", f"count: {WORLD_SIZE}"))
    train_on_ranks(experiment, ranks_plan())
    return folder / "whole"


def wait_for_steps(run_dir: Path, steps: int, process: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + 90
    metrics = run_dir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s, "no steps"
        time.sleep(0.01)


def test_ranks_have_the_losses_of_one_process(folder: Path, whole: Path) -> None:
    assert len(losses(whole)) == STEPS
    assert losses(whole) == pytest.approx(losses(folder / "alone"), abs=1e-5)


def test_measured_costs_explain_the_iteration(whole: Path) -> None:
    measured = load_cluster(whole / "measured.yaml")
    plan = recost(load_plan(whole / "plan.json"), measured)
    assert measured.measured_for == experiment_measured_for(load_run(whole), len(plan.stages))
    iterations_s = [entry["perf/iteration_s"] for entry in read_metrics(whole / "metrics.jsonl")]
    # Reduction, clipping and optimizer come on top; a crowded machine makes some steps much longer.
    assert 0.1 * min(iterations_s) < simulate(plan).pipeline_s < 1.5 * max(iterations_s)
    assert "steps up to step 20" in (whole / "measured.yaml").read_text()


def test_run_stopped_by_sigterm_continues_bitwise(folder: Path, whole: Path) -> None:
    by_launch = {"enabled": "auto", "plans_ahead": False}
    parts = write_inputs(make_experiment(folder, "parts", training=LONG, recovery=by_launch), ranks_plan(), folder)
    launcher = start_torchrun(parts)
    wait_for_steps(folder / "parts", 3, launcher)
    workers = [process for process in psutil.Process(launcher.pid).children() if "train" in process.cmdline()]
    assert len(workers) == WORLD_SIZE
    workers[1].send_signal(signal.SIGTERM)
    code, output = finish(launcher)
    assert code == 75, output
    stopped_at = len(losses(folder / "parts"))
    assert 3 <= stopped_at < STEPS
    assert complete_checkpoints(folder / "parts")[-1].name == f"step-{stopped_at:08d}"
    assert "stopped after step" in output
    assert f"a lost process ends the run: a launcher that runs {WORLD_SIZE} processes on a host ends all" in output
    assert "the run stops here, on all ranks, by SIGTERM to this rank" in output
    assert output.count("the run stops here, on all ranks, by a signal to rank") == WORLD_SIZE - 1

    _, config, _, plan = parts
    results = [rank.finish() for rank in start_ranks(Path(config), Path(plan))]
    assert [code for code, _ in results] == [0] * WORLD_SIZE, results
    assert f"continuing after step {stopped_at}" in results[0][1]
    assert "others come in with: skippipe join" in results[0][1]
    assert losses(folder / "parts") == losses(whole)


def test_kill_while_saving_leaves_the_checkpoint_before(folder: Path) -> None:
    experiment = make_experiment(folder, "killed", training=LONG, checkpoint={"interval": 5}, comm={"timeout_s": 10})
    _, config, _, plan = write_inputs(experiment, ranks_plan(), folder)
    ranks = start_ranks_that_die_while_saving(Path(config), Path(plan), step=10)
    results = [rank.finish() for rank in ranks]
    assert [code for code, _ in results] == [-signal.SIGKILL, 1, 1], results
    for rank, (_, output) in enumerate(results[1:], start=1):
        assert f"[rank {rank}] skippipe: error:" in output
        assert "Traceback" not in output
    run_dir = folder / "killed"
    assert (run_dir / "checkpoints" / ".step-00000010.tmp").is_dir()
    assert [path.name for path in complete_checkpoints(run_dir)] == ["step-00000005"]
    # One process takes over.
    summary = train_alone(experiment, ranks_plan())
    assert summary.first_step == 5
    assert losses(run_dir) == pytest.approx(losses(folder / "alone"), abs=1e-5)
    assert not list((run_dir / "checkpoints").glob(".*"))


def test_a_long_step_is_given_up_on_all_ranks_and_the_one_before_saved(folder: Path) -> None:
    patient = {"interval": 4, "patience_s": 0.5}
    experiment = make_experiment(folder, "long", training=LONG, checkpoint=patient, comm={"timeout_s": 30})
    _, config, _, plan = write_inputs(experiment, ranks_plan(), folder)
    results = [rank.finish(60) for rank in start_ranks_in_a_long_step(Path(config), Path(plan), step=6)]
    assert [code for code, _ in results] == [75] * WORLD_SIZE, results
    for _, output in results:
        assert "it is given up, and step 6 saved" in output
        assert "Traceback" not in output
    assert [path.name for path in complete_checkpoints(folder / "long")][-1] == "step-00000006"
    assert train_alone(experiment, ranks_plan()).first_step == 6
    assert losses(folder / "long") == pytest.approx(losses(folder / "alone"), abs=1e-5)
