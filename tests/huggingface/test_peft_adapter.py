"""Adapters beside peft: gradients, files to and from it, what it computes with them, and what cannot be taken in."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pretrained_models import SHORT, logits_of, write_experiment, write_pretrained
from safetensors.torch import load_file
from tiny_models import hugging_face, move_off_zero, samples, stages_of, tiny, walk
from training_runs import ALONE
from transformers import AutoModelForCausalLM

from skippipe.checkpoint.huggingface.export import export_run
from skippipe.checkpoint.huggingface.import_model import import_model
from skippipe.checkpoint.huggingface.peft_adapter import UNKNOWN_HERE, export_adapter, read_adapter
from skippipe.checkpoint.reader import read_metadata, require_checkpoint
from skippipe.cli.main import skippipe
from skippipe.config.experiment_file import load_run
from skippipe.config.lora_options import LoraOptions
from skippipe.errors import InputError
from skippipe.model.architecture import experiment_model
from skippipe.model.architecture_traits import TRAITS
from skippipe.model.linear.lora import STORED_PREFIX
from skippipe.planning.sharing import share_plans
from skippipe.training.loop import train

LORA = (
    "lora.r=2",
    "lora.lora_alpha=4",
    "lora.modules_to_save=[norm]",
    "optimizer.lr=0.05",
    "lr_scheduler.warmup_steps=0",
)


PLAIN = LoraOptions(r=4, lora_alpha=8)
RSLORA = LoraOptions(r=4, use_rslora=True, target_modules=r".*\.(q_proj|down_proj)", modules_to_save=("norm",))


@pytest.mark.parametrize(("architecture", "options"), [("gpt2", PLAIN), ("llama", RSLORA)])
def test_gradients_are_those_of_peft(architecture: str, options: LoraOptions) -> None:
    peft = pytest.importorskip("peft")
    config = tiny(architecture, tie_word_embeddings=False)
    stages = stages_of(config, (0, 1, 4), lora=options)
    tensors = move_off_zero(stages)
    targets = options.target_modules
    given = peft.LoraConfig(
        r=4,
        lora_alpha=options.lora_alpha,
        use_rslora=options.use_rslora,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(options.modules_to_save) or None,
        task_type="CAUSAL_LM",
        fan_in_fan_out=TRAITS[architecture].fan_in_fan_out,
    )
    model = peft.get_peft_model(hugging_face(config), given)
    own = {name if name.startswith(STORED_PREFIX) else STORED_PREFIX + name: tensor for name, tensor in tensors.items()}
    assert own.keys() == peft.get_peft_model_state_dict(model).keys()
    peft.set_peft_model_state_dict(model, own)
    input_ids, labels = samples()
    expected = torch.nn.functional.cross_entropy(model(input_ids).logits.flatten(0, 1), labels.flatten())
    expected.backward()
    loss = stages[0].loss(walk(stages, (0, 1), input_ids), labels)
    loss.backward()
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)
    theirs = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    mine = {name: parameter.grad for stage in stages for name, parameter in stage.trained_parameters().items()}
    assert len(mine) == len(theirs)
    for name, gradient in theirs.items():
        stored = name.replace(".default", "").replace(".modules_to_save", "")
        found = mine[stored if ".lora_" in stored else stored.removeprefix(STORED_PREFIX)]
        assert found is not None
        assert torch.allclose(found, gradient, atol=1e-5, rtol=0), name
    frozen = [parameter for stage in stages for parameter in stage.parameters() if not parameter.requires_grad]
    assert frozen
    assert all(parameter.grad is None for parameter in frozen)


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


def test_an_adapter_comes_in_as_it_went_out(folder: Path) -> None:
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
    export_adapter(folder / "again", folder / "copied")
    own, copied = (load_file(folder / name / "adapter_model.safetensors") for name in ("adapter", "copied"))
    assert own.keys() == copied.keys()
    assert all(torch.equal(tensor, copied[name]) for name, tensor in own.items())


def test_an_adapter_keeps_its_dtype_beside_weights_in_another(folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder / "given").bfloat16().save_pretrained(tmp_path / "given")
    shutil.copy(folder / "given" / "tokenizer.json", tmp_path / "given")
    shutil.copy(folder / "given" / "tokenizer_config.json", tmp_path / "given")
    import_model(
        tmp_path / "given",
        tmp_path / "run",
        config_path=folder / "experiment.yaml",
        overrides=SHORT,
        adapter=folder / "adapter",
    )
    assert read_metadata(require_checkpoint(tmp_path / "run")).dtype == "bfloat16"
    export_adapter(tmp_path / "run", tmp_path / "copied")
    own, copied = (load_file(path / "adapter_model.safetensors") for path in (folder / "adapter", tmp_path / "copied"))
    assert {tensor.dtype for tensor in own.values()} == {torch.float32}
    assert all(tensor.equal(copied[name]) and tensor.dtype == copied[name].dtype for name, tensor in own.items())
    export_adapter(tmp_path / "run", tmp_path / "halved", dtype="bfloat16")
    halved = load_file(tmp_path / "halved" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in halved.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3; only LORA"),
        ({"use_dora": True}, "use_dora is True, which is not supported; merge that adapter"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alora_invocation_tokens": [200, 201]}, r"alora_invocation_tokens is \[200, 201\]"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config"),
        ({"velora_config": {"num_groups": 64}}, "velora_config"),
        ({"monteclora_config": {"num_samples": 8}}, "monteclora_config"),
        ({"layers_to_transform": 0}, "layers_to_transform is 0, which is not supported"),
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


def test_every_variant_of_peft_is_known_by_its_key() -> None:
    peft = pytest.importorskip("peft")
    variants = {option.name for option in dataclasses.fields(peft.LoraConfig) if option.metadata.get("is_lora_variant")}
    assert variants <= set(UNKNOWN_HERE)


def test_an_adapter_that_peft_has_written_is_read(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    given = AutoModelForCausalLM.from_pretrained(folder / "given")
    options = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(given, options).save_pretrained(tmp_path)
    found = read_adapter(tmp_path, experiment_model(load_run(folder / "run")))
    assert set(found.options.target_modules) == {"q_proj", "down_proj"}


def test_a_run_without_adapter_has_none_to_export(folder: Path) -> None:
    result = CliRunner().invoke(
        skippipe, ["export", str(folder / "run"), str(folder / "none"), "--adapter", "--step", "0"]
    )
    assert "it has no adapter (lora.r is 0); export the whole model" in str(result.exception)
    assert not (folder / "none").exists()
