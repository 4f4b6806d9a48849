"""Adapters to and from peft's files: what peft computes with them, and what cannot be taken in."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pretrained_models import SHORT, logits_of, write_experiment, write_pretrained
from safetensors.torch import load_file
from training_runs import ALONE
from transformers import AutoModelForCausalLM

from skippipe.checkpoint.huggingface.export import export_run
from skippipe.checkpoint.huggingface.import_model import import_model
from skippipe.checkpoint.huggingface.peft_adapter import export_adapter, read_adapter
from skippipe.cli.main import skippipe
from skippipe.config.experiment_file import load_run
from skippipe.errors import InputError
from skippipe.model.architecture import experiment_model
from skippipe.planning.sharing import share_plans
from skippipe.training.loop import train

LORA = (
    "lora.r=2",
    "lora.lora_alpha=4",
    "lora.modules_to_save=[norm]",
    "optimizer.lr=0.05",
    "lr_scheduler.warmup_steps=0",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a run that has trained adapters for it, and what that exports."""
    path = tmp_path_factory.mktemp("adapters")
    write_pretrained(path / "given")
    config = write_experiment(path)
    import_model(path / "given", path / "run", config_path=config, overrides=(*SHORT, *LORA))
    experiment = load_run(path / "run")
    train(experiment, share_plans(experiment, None, ALONE), ALONE)
    export_adapter(path / "run", path / "adapter")
    export_run(path / "run", path / "merged")
    return path


def test_peft_computes_what_the_run_does(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    given = AutoModelForCausalLM.from_pretrained(folder / "given")
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        before = given(ids).logits
        loaded = peft.PeftModel.from_pretrained(given, folder / "adapter")
        logits = loaded(ids).logits
    assert torch.allclose(logits, logits_of(folder / "merged", ids), atol=1e-4)
    assert not torch.allclose(logits, before, atol=1e-2)
    names = peft.get_peft_model_state_dict(loaded).keys()
    assert names == load_file(folder / "adapter" / "adapter_model.safetensors").keys()


def test_an_adapter_is_trained_on(folder: Path) -> None:
    config = folder / "experiment.yaml"
    import_model(
        folder / "given",
        folder / "again",
        config_path=config,
        overrides=(*SHORT, "lora.lora_dropout=0.1"),
        adapter=folder / "adapter",
    )
    experiment = load_run(folder / "again")
    lora = experiment.lora
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (2, 4, 0.1)
    assert "q_proj" in lora.target_modules
    ids = torch.arange(20).reshape(2, 10)
    export_run(folder / "again", folder / "same")
    assert torch.equal(logits_of(folder / "same", ids), logits_of(folder / "merged", ids))
    train(experiment, share_plans(experiment, None, ALONE), ALONE)
    export_adapter(folder / "again", folder / "further")
    own, further = (load_file(folder / name / "adapter_model.safetensors") for name in ("adapter", "further"))
    assert own.keys() == further.keys()
    assert not any(torch.equal(tensor, further[name]) for name, tensor in own.items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3; only LORA"),
        ({"use_dora": True}, "use_dora is True, which is not supported; merge that adapter"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"r": 4}, r"lora_A.weight: shape \(2, "),
        ({"target_modules": ["q_proj"]}, "another|other target_modules"),
        ({"r": None}, "adapter_config.json: r"),
    ],
)
def test_other_adapters_are_refused(folder: Path, tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(InputError, match=message):
        read_adapter(tmp_path / "adapter", experiment_model(load_run(folder / "run")))


def test_a_run_without_adapter_has_none_to_export(folder: Path) -> None:
    result = CliRunner().invoke(
        skippipe, ["export", str(folder / "run"), str(folder / "none"), "--adapter", "--step", "0"]
    )
    assert "it has no adapter (lora.r is 0); export the whole model" in str(result.exception)
    assert not (folder / "none").exists()
