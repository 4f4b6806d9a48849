"""Optimizer state sharded over the replicas of a stage: the same training, a part of the state on each, and back."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from training_runs import losses, make_experiment, ranks_plan, train_alone, train_on_ranks

from skippipe.checkpoint.reader import checkpoint_path
from skippipe.config.experiment import Experiment
from skippipe.monitor.metrics_file import read_metrics
from skippipe.planning.workload.experiment_workload import experiment_workload

STEPS, HALF = 8, 4
SHARDED = {"backend": "zero_redundancy"}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(170)]


def experiment(folder: Path, name: str, dtype: str = "float32", **sections: object) -> Experiment:
    training = {"max_steps": STEPS, "dtype": dtype}
    return make_experiment(folder, name, training=training, checkpoint={"interval": HALF}, **sections)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of both back-ends on several ranks, and one of a single process."""
    path = tmp_path_factory.mktemp("sharded")
    train_alone(experiment(path, "alone"), ranks_plan())
    train_on_ranks(experiment(path, "replicated"), ranks_plan())
    train_on_ranks(experiment(path, "sharded", optimizer=SHARDED), ranks_plan())
    return path


def test_losses_are_those_of_replicated_state(folder: Path) -> None:
    assert losses(folder / "sharded") == losses(folder / "replicated")


def test_every_replica_keeps_and_saves_its_part(folder: Path) -> None:
    checkpoint = checkpoint_path(folder / "sharded", STEPS)
    whole = checkpoint_path(folder / "replicated", STEPS)
    plan = ranks_plan()
    for index, stage in enumerate(plan.stages):
        parts = [load_file(path) for path in sorted(checkpoint.glob(f"optimizer-stage-{index}-*"))]
        expected = load_file(whole / f"optimizer-stage-{index}.safetensors")
        if len(stage.nodes) == 1:
            parts = [load_file(checkpoint / f"optimizer-stage-{index}.safetensors")]
        assert len(parts) == len(stage.nodes)
        assert sum(len(part) for part in parts) == len(expected)
        merged = {name: tensor for part in parts for name, tensor in part.items()}
        assert merged.keys() == expected.keys()
        for name, tensor in expected.items():
            assert merged[name].equal(tensor), name
        numbers = [sum(tensor.numel() for tensor in part.values()) for part in parts]
        assert max(numbers) < 0.6 * sum(numbers) or len(parts) == 1


def continued(folder: Path, chosen: Experiment) -> list[float]:
    """Return the losses after the first half of a run that begins at another run's checkpoint."""
    entries = read_metrics(folder / chosen.name / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == list(range(HALF + 1, STEPS + 1))
    return [entry["train/loss"] for entry in entries]


def test_one_process_continues_a_sharded_run(folder: Path) -> None:
    resume = {"interval": HALF, "resume": str(checkpoint_path(folder / "sharded", HALF))}
    chosen = make_experiment(folder, "gathered", training={"max_steps": STEPS}, checkpoint=resume)
    train_alone(chosen, ranks_plan())
    assert continued(folder, chosen) == pytest.approx(losses(folder / "alone")[HALF:], abs=1e-5)


def test_ranks_continue_the_run_of_one_process_with_shards(folder: Path) -> None:
    resume = {"interval": HALF, "resume": str(checkpoint_path(folder / "alone", HALF))}
    chosen = make_experiment(folder, "scattered", training={"max_steps": STEPS}, checkpoint=resume, optimizer=SHARDED)
    train_on_ranks(chosen, ranks_plan())
    assert continued(folder, chosen) == pytest.approx(losses(folder / "alone")[HALF:], abs=1e-5)


@pytest.mark.extended
def test_master_copies_are_sharded_too(tmp_path: Path) -> None:
    for name, backend in (("replicated", {}), ("sharded", SHARDED)):
        train_on_ranks(experiment(tmp_path, name, "bfloat16", optimizer=backend), ranks_plan())
    assert losses(tmp_path / "sharded") == losses(tmp_path / "replicated")


def test_the_planner_divides_what_is_shared_out(tmp_path: Path) -> None:
    whole = experiment_workload(experiment(tmp_path, "whole"))
    shared = experiment_workload(experiment(tmp_path, "shared", optimizer=SHARDED))
    assert shared.layer_state_bytes + shared.layer_shared_bytes == whole.layer_state_bytes
    assert shared.layer_shared_bytes == whole.layer_state_bytes // 2
    assert shared.embedding_and_head_state_bytes == whole.embedding_and_head_state_bytes
