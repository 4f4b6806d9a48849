"""Checkpoints: whole, damaged, of another model, and under another split of the stages."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import ALONE, make_experiment, small_plan, train_alone

from skippipe.checkpoint.model_tensors import load_parameters
from skippipe.checkpoint.reader import (
    complete_checkpoints,
    latest_checkpoint,
    load_tensors,
    read_metadata,
)
from skippipe.config.experiment import Experiment
from skippipe.errors import CheckpointError, ConfigError
from skippipe.model.architecture import experiment_model
from skippipe.model.full_model import build_full
from skippipe.runtime.runner_factory import make_runner
from skippipe.training.optimizer import AdamW


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of 3 stages, trained for 4 steps."""
    folder = tmp_path_factory.mktemp("trained")
    train_alone(make_experiment(folder, training={"max_steps": 4}))
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of that folder to damage."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def resumable(folder: Path, **sections: Any) -> Experiment:
    return make_experiment(folder, **({"training": {"max_steps": 6}} | sections))


def test_checkpoint_holds_hugging_face_names_and_what_it_belongs_to(trained: Path) -> None:
    checkpoint = latest_checkpoint(trained / "run")
    assert checkpoint is not None
    assert checkpoint.name == "step-00000004"
    metadata = read_metadata(checkpoint)
    assert (metadata.step, metadata.tokens, metadata.plan_hash) == (4, 4 * 4 * 2 * 16, small_plan().hash)
    assert metadata.data["samples_seen"] == 4 * 4 * 2
    names = {name for stage in range(3) for name in load_file(checkpoint / f"model-stage-{stage}.safetensors")}
    config = experiment_model(make_experiment(trained))
    assert names == set(dict(build_full(config, seed=3, device=torch.device("cpu")).named_parameters()))
    assert not list((trained / "run" / "checkpoints").glob(".*"))


@pytest.mark.parametrize(("num_stages", "layers_per_stage"), [(2, 3), (3, 2)])
def test_any_split_loads_the_same_tensors(trained: Path, num_stages: int, layers_per_stage: int) -> None:
    checkpoint = latest_checkpoint(trained / "run")
    assert checkpoint is not None
    experiment = make_experiment(trained)
    config = experiment_model(experiment)
    plan = small_plan(num_stages=num_stages, layers_per_stage=layers_per_stage)
    runner = make_runner(experiment, plan, config, ALONE)
    metadata = load_parameters(checkpoint, config, runner.stages.values())
    stored: dict[str, torch.Tensor] = {}
    for stage in range(3):
        stored |= load_file(checkpoint / f"model-stage-{stage}.safetensors")
    assert stored.keys() == runner.parameters().keys()
    for name, parameter in runner.parameters().items():
        assert torch.equal(parameter, stored[name]), name
    optimizer = AdamW(runner.parameters(), experiment.optimizer, experiment.lr_scheduler, 6)
    state = load_tensors(checkpoint, metadata, "optimizer", runner.parameters())
    optimizer.load(state, metadata.step)
    again = optimizer.state(runner.parameters())
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert float(again["model.embed_tokens.weight.step"]) == 4


def test_run_continues_under_another_plan_and_split(folder: Path) -> None:
    summary = train_alone(resumable(folder), small_plan(num_stages=2, layers_per_stage=3))
    assert (summary.first_step, summary.step) == (4, 6)
    checkpoint = latest_checkpoint(folder / "run")
    assert checkpoint is not None
    assert sorted(path.name for path in checkpoint.glob("model-*")) == [
        "model-stage-0.safetensors",
        "model-stage-1.safetensors",
    ]


def test_whole_model_loads_from_all_stages(trained: Path) -> None:
    checkpoint = latest_checkpoint(trained / "run")
    assert checkpoint is not None
    model = build_full(experiment_model(make_experiment(trained)), seed=99, device=torch.device("cpu"))
    metadata = read_metadata(checkpoint)
    tensors = load_tensors(checkpoint, metadata, "model", dict(model.named_parameters()))
    assert model.load_state_dict(tensors, strict=False).unexpected_keys == []
    assert set(tensors) == set(dict(model.named_parameters()))


def newest(folder: Path) -> Path:
    return folder / "run" / "checkpoints" / "step-00000004"


def truncate(folder: Path) -> None:
    path = newest(folder) / "model-stage-1.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def remove_metadata(folder: Path) -> None:
    (newest(folder) / "metadata.json").unlink()


def remove_file(folder: Path) -> None:
    (newest(folder) / "optimizer-stage-2.safetensors").unlink()


@pytest.mark.parametrize("damage", [truncate, remove_metadata, remove_file], ids=lambda damage: damage.__name__)
def test_incomplete_checkpoint_is_passed_over(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder)
    assert [path.name for path in complete_checkpoints(folder / "run")] == ["step-00000002"]
    assert train_alone(resumable(folder)).first_step == 2
    assert newest(folder) in complete_checkpoints(folder / "run")


def test_named_incomplete_checkpoint_is_an_error(folder: Path) -> None:
    truncate(folder)
    with pytest.raises(CheckpointError, match=r"model-stage-1\.safetensors: \d+ bytes, \d+ when it was saved"):
        train_alone(resumable(folder, checkpoint={"resume": str(newest(folder))}))
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        train_alone(resumable(folder, checkpoint={"resume": str(folder / "nothing")}))


@pytest.mark.parametrize("kind", ["model", "optimizer"])
def test_edited_file_is_refused(folder: Path, kind: str) -> None:
    path = newest(folder) / f"{kind}-stage-1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{kind}-stage-1\.safetensors: its content is not what was saved"):
        train_alone(resumable(folder, checkpoint={"resume": str(newest(folder))}))


def test_file_names_that_lead_elsewhere_are_refused(folder: Path) -> None:
    path = newest(folder) / "metadata.json"
    content = json.loads(path.read_text())
    content["files"]["../../model-stage-0.safetensors"] = {"size_bytes": 0, "sha256": ""}
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"metadata\.json: files"):
        read_metadata(newest(folder))


def test_other_model_is_refused_by_its_difference(folder: Path) -> None:
    model = make_experiment(folder).model.model_dump()
    model["options"]["intermediate_size"] = 64
    with pytest.raises(CheckpointError, match=r"the checkpoint's model has intermediate_size 48, this run's 64"):
        train_alone(resumable(folder, model=model))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"seed": 4}, "the checkpoint's data order has .*seed|tokens"),
        ({"training": {"max_steps": 6, "sequence_length": 8}}, "sequence_length 16, this run 8"),
        ({"training": {"max_steps": 6, "micro_batch_size": 1}}, "samples_per_iteration 8, this run 4"),
    ],
)
def test_other_data_order_is_refused(folder: Path, sections: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        train_alone(resumable(folder, **sections))


def test_only_the_newest_are_kept(folder: Path) -> None:
    train_alone(resumable(folder, checkpoint={"interval": 1, "keep_last": 2}))
    assert [path.name for path in complete_checkpoints(folder / "run")] == ["step-00000005", "step-00000006"]


@pytest.mark.parametrize("resume", ["never", "step-00000002"])
def test_checkpoints_beyond_the_start_are_never_mixed_in(folder: Path, resume: str) -> None:
    start = resume if resume == "never" else str(folder / "run" / "checkpoints" / resume)
    with pytest.raises(ConfigError, match=r"step-00000004 is there already; choose another run_dir"):
        train_alone(resumable(folder, checkpoint={"resume": start}))


def test_checkpoint_of_another_run_starts_a_new_one(folder: Path) -> None:
    summary = train_alone(resumable(folder, name="second", checkpoint={"resume": str(newest(folder))}))
    assert (summary.first_step, summary.step) == (4, 6)


def test_leftovers_of_an_interrupted_save_are_removed(folder: Path) -> None:
    leftover = folder / "run" / "checkpoints" / ".step-00000005.tmp"
    leftover.mkdir()
    (leftover / "model-stage-0.safetensors").write_bytes(b"half")
    train_alone(resumable(folder))
    assert not leftover.exists()
