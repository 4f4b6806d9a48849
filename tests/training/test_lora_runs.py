"""Runs that train adapters beside frozen weights: the same on several ranks, after a stop, and in another place."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import losses, make_experiment, ranks_plan, train_alone

from skippipe.checkpoint.model_tensors import check_adapters, load_parameters
from skippipe.checkpoint.reader import (
    Metadata,
    checkpoint_path,
    complete_checkpoints,
    latest_checkpoint,
    load_tensors,
    model_identity,
    read_metadata,
)
from skippipe.checkpoint.soundness import newest_sound_checkpoint
from skippipe.checkpoint.writer import write_stages
from skippipe.config.experiment import Experiment
from skippipe.config.lora_options import LoraOptions
from skippipe.errors import CheckpointError, ConfigError
from skippipe.inference.model_loading import load_model
from skippipe.model.architecture import experiment_model
from skippipe.model.full_model import build_full
from skippipe.model.linear.lora import STORED_PREFIX, is_adapter_name
from skippipe.model.stage import build_stage

CPU = torch.device("cpu")
LORA = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "modules_to_save": ["norm"]}
DEFAULTS: dict[str, Any] = {
    "lora": LORA,
    "training": {"max_steps": 4},
    "optimizer": {"lr": 1e-2},
    "lr_scheduler": {"warmup_steps": 1, "min_lr_ratio": 1.0},  # the rate does not depend on the last step
    "evaluation": {"interval": 0},
}
WEIGHTS_SEED = 11
"""Of the weights that a run begins from: others than it would draw."""


def lora_experiment(folder: Path, name: str, *, begin: bool = True, **sections: Any) -> Experiment:
    """Return an experiment with adapters, whose run begins from weights in its directory."""
    experiment = make_experiment(folder, name, **{**DEFAULTS, **sections})
    if begin:
        config = experiment_model(experiment)
        weights = build_full(config, WEIGHTS_SEED, CPU)
        metadata = Metadata(
            step=0,
            tokens=0,
            elapsed_s=0.0,
            seed=experiment.seed,
            dtype="float32",
            model=model_identity(config),
            data={},
            plan_hash="none",
            files={},
        )
        tensors = {name: parameter.detach() for name, parameter in weights.named_parameters()}
        write_stages(experiment.run_path, metadata, [tensors])
    return experiment


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one process that was never stopped."""
    path = tmp_path_factory.mktemp("adapters")
    train_alone(lora_experiment(path, "whole"), ranks_plan())
    return path


def tensors_of(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None
    stored = read_metadata(checkpoint)
    names = [*build_all(run_dir).global_parameters()]
    return load_tensors(checkpoint, stored, "model", names) | load_tensors(checkpoint, stored, "optimizer", names)


def build_all(run_dir: Path) -> Any:
    experiment = make_experiment(run_dir.parent, run_dir.name, lora=LORA)
    return build_stage(
        experiment_model(experiment),
        0,
        6,
        with_embedding_and_head=True,
        seed=0,
        device=CPU,
        dtype=torch.float32,
        lora=experiment.lora,
    )


def test_losses_fall_and_only_what_is_trained_is_saved(folder: Path) -> None:
    found = losses(folder / "whole")
    assert found[-1] < found[0] - 0.005
    saved = tensors_of(folder / "whole")
    frozen = {name for name in build_all(folder / "whole").global_parameters() if not is_adapter_name(name)}
    assert {name for name in saved if name in frozen} == {name for name in frozen if name.endswith("norm.weight")}
    assert any(name.startswith(STORED_PREFIX) and name.endswith("lora_B.weight") for name in saved)
    assert any(name.endswith("lora_A.weight.exp_avg") for name in saved)
    begun, newest = (
        sum(path.stat().st_size for path in checkpoint_path(folder / "whole", step).glob("model-*")) for step in (0, 4)
    )
    assert newest < 0.3 * begun


@pytest.fixture(scope="module")
def stopped(folder: Path) -> Experiment:
    """The same run, which ended after 2 steps and was moved to another place."""
    experiment = lora_experiment(folder, "first", training={"max_steps": 2}, checkpoint={"interval": 1, "keep_last": 1})
    train_alone(experiment, ranks_plan())
    shutil.move(folder / "first", folder / "moved")
    training = experiment.training.model_copy(update={"max_steps": 4})
    return experiment.model_copy(update={"run_dir": str(folder / "moved"), "training": training})


def test_a_moved_run_goes_on_bit_by_bit(folder: Path, stopped: Experiment) -> None:
    names = [path.name for path in complete_checkpoints(stopped.run_path)]
    assert names == ["step-00000000", "step-00000002"]  # the one with the frozen weights stays
    elsewhere = lora_experiment(
        folder, "elsewhere", begin=False, checkpoint={"resume": str(checkpoint_path(stopped.run_path, 2))}
    )
    train_alone(elsewhere, ranks_plan())
    train_alone(stopped, ranks_plan())
    assert losses(stopped.run_path) == losses(folder / "whole")
    shutil.rmtree(stopped.run_path)
    mine, theirs = tensors_of(folder / "elsewhere"), tensors_of(folder / "whole")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    assert len(complete_checkpoints(folder / "elsewhere")) > 1  # they do not need the run that they came from


def test_inference_has_the_adapters_in_its_weights(folder: Path) -> None:
    trained = build_all(folder / "whole")
    checkpoint = checkpoint_path(folder / "whole", 4)
    load_parameters(checkpoint, trained.body.config, [trained])
    decoder = load_model(folder / "whole", device="cpu").decoder
    input_ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        applied = trained.eval().logits(trained(trained.embed(input_ids)))
        merged = decoder.skeleton.model(input_ids).logits
    assert torch.allclose(merged, applied, atol=1e-4)
    assert not any(map(is_adapter_name, dict(decoder.skeleton.model.named_parameters())))


def test_damage_of_the_frozen_weights_is_noticed(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "whole", tmp_path / "run")
    base = checkpoint_path(tmp_path / "run", 0)
    path = next(base.glob("model-*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints can be read"):
        newest_sound_checkpoint(tmp_path / "run")
    shutil.rmtree(base)
    assert not complete_checkpoints(tmp_path / "run")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"r": 3}, "lora.r: 3, but .* was trained with 2; continue with lora.r=2"),
        (LORA | {"lora_alpha": 5}, "lora.lora_alpha: 5.0, but .* was trained with 4.0"),
        ({}, "lora.r: 0, but .* was trained with 2"),
    ],
)
def test_other_adapters_than_before_are_refused(folder: Path, changed: dict[str, Any], message: str) -> None:
    checkpoint = checkpoint_path(folder / "whole", 4)
    with pytest.raises(CheckpointError, match=message):
        check_adapters(checkpoint, read_metadata(checkpoint), LoraOptions.model_validate(changed))


def test_adapters_need_weights_and_keep_layers_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint with weights to train adapters for; make the run with skipp"):
        train_alone(lora_experiment(tmp_path, "random", begin=False), ranks_plan())
    with pytest.raises(ValueError, match="rebuild takes the mean of other layers"):
        make_experiment(tmp_path, lora=LORA, recovery={"lost_stage": ["rebuild", "stop"]})
