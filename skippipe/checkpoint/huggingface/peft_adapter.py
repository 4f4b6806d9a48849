"""Adapters in peft's format: adapter_config.json and adapter_model.safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

from skippipe.checkpoint.huggingface.new_directory import check_unused, new_directory
from skippipe.checkpoint.model_tensors import load_model_tensors
from skippipe.checkpoint.reader import check_model, checkpoint_path, read_metadata
from skippipe.checkpoint.soundness import require_sound_checkpoint
from skippipe.config.experiment_file import load_run
from skippipe.config.lora_options import ALL_LINEAR, LoraOptions
from skippipe.errors import CheckpointError, InputError
from skippipe.model.architecture import experiment_model, num_layers
from skippipe.model.architecture_traits import traits_of
from skippipe.model.device import torch_dtype
from skippipe.model.linear.lora import STORED_PREFIX, add_adapters, is_adapter_name, plain_name
from skippipe.model.skeleton import build_skeleton
from skippipe_scheduler.files import parse, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UNKNOWN_HERE: Final = (
    *("alora_invocation_tokens", "alpha_pattern", "arrow_config", "exclude_modules", "kasa_config"),
    *("layer_replication", "layers_to_transform", "lora_bias", "monteclora_config", "rank_pattern"),
    *("target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "velora_config"),
)
"""Options of peft under which an adapter is another one than here, unless they are off."""
OFF: Final = ("null", "false", "{}", "[]", '"none"')
"""Values of these options that turn them off, in JSON: there 0, which names a layer, is not false."""
CHANGES_WEIGHTS: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways of `init_lora_weights` that change the weights beside the adapter, too."""


class AdapterConfig(BaseModel):
    """What of adapter_config.json is known here; more keys may be there."""

    peft_type: str
    r: int = Field(ge=1)
    lora_alpha: float = Field(gt=0)
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: list[str] | str
    modules_to_save: list[str] | None = None


class PeftAdapter(NamedTuple):
    """An adapter as peft stores it."""

    options: LoraOptions
    tensors: dict[str, Tensor]
    """By the names that parameters of a stage have: of an adapter as in peft's file, of others as in the model."""


def export_adapter(run_dir: Path, target: Path, *, step: int | None = None, dtype: str | None = None) -> Path:
    """Write the adapter of a run's checkpoint as a directory that `PeftModel.from_pretrained` loads.

    Args:
        run_dir: The run's directory.
        target: The directory to write; it must not exist, or be empty.
        step: The optimizer step of the checkpoint; the newest one where not given.
        dtype: What the tensors are converted to, as `torch` names it; as in the checkpoint where not given.

    Returns:
        The directory of the checkpoint that was read.

    Raises:
        InputError: `run_dir` is no run or has no adapter, or `target` is in use.
        CheckpointError: There is no such checkpoint, or it is damaged.
        StorageError: `target` cannot be written; then nothing is left there.
    """
    experiment = load_run(run_dir)
    checkpoint = require_sound_checkpoint(run_dir) if step is None else checkpoint_path(run_dir, step)
    check_unused(target)
    config, metadata = experiment_model(experiment), read_metadata(checkpoint)
    check_model(checkpoint, metadata, config)
    if metadata.lora is None:
        raise InputError(f"{checkpoint}: it has no adapter (lora.r is 0); export the whole model")
    options = LoraOptions.model_validate(metadata.lora | {"lora_dropout": experiment.lora.lora_dropout})
    shapes = trained_shapes(config, options)
    tensors = load_model_tensors(checkpoint, shapes)
    _check_names(checkpoint, tensors, shapes)
    if dtype is not None:
        tensors = {name: tensor.to(torch_dtype(dtype)) for name, tensor in tensors.items()}
    with new_directory(target) as folder:
        renamed = {_in_file(name): tensor.contiguous() for name, tensor in tensors.items()}
        save_file(renamed, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(_config_of(options, config, shapes), indent=2) + "\n")
    return checkpoint


def read_adapter(folder: Path, config: PretrainedConfig) -> PeftAdapter:
    """Return the adapter in a directory; raise `InputError` where it is none that fits the model of `config`."""
    path = folder / CONFIG
    content = read_json(path, InputError)
    known = parse(AdapterConfig, content, str(path), InputError)
    if known.peft_type != "LORA":
        raise InputError(f"{path}: peft_type is {known.peft_type}; only LORA can be imported")
    another = next((key for key in UNKNOWN_HERE if json.dumps(content.get(key)) not in OFF), None)
    if content.get("bias", "none") != "none":
        another = "bias"
    if str(content.get("init_lora_weights")).startswith(CHANGES_WEIGHTS):
        another = "init_lora_weights"
    if another is not None:
        raise InputError(
            f"{path}: {another} is {content[another]!r}, which is not supported; merge that adapter into its model "
            "with peft (merge_and_unload) where peft can, and import the model"
        )
    options = LoraOptions.model_validate(
        known.model_dump(exclude={"peft_type"}) | {"modules_to_save": known.modules_to_save or ()}
    )
    weights = folder / WEIGHTS
    try:
        tensors = {_in_run(name): tensor for name, tensor in load_file(weights).items()}
    except (SafetensorError, OSError) as reason:
        raise InputError(f"{weights}: cannot be read ({reason}); other formats are not loaded") from None
    _check_names(weights, tensors, trained_shapes(config, options), InputError)
    return PeftAdapter(options, tensors)


def trained_shapes(config: PretrainedConfig, options: LoraOptions) -> dict[str, torch.Size]:
    """Return the shapes of all parameters that are trained with these options, by name."""
    skeleton = build_skeleton(config, torch.float32)
    add_adapters(skeleton, range(num_layers(config)), options, seed=0)
    parameters = skeleton.model.named_parameters()
    return {plain_name(name): parameter.shape for name, parameter in parameters if parameter.requires_grad}


def _check_names(
    path: Path,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    error: type[InputError] = CheckpointError,
) -> None:
    """Raise `error` where the tensors are not exactly those of the model's adapter."""
    missing, unknown = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing or unknown:
        what = f"{missing[0]} is missing" if missing else f"the model has no adapter {unknown[0]}"
        raise error(f"{path}: {what}; the adapter is of another model, or of other target_modules")
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise error(f"{path}: {name}: shape {tuple(tensor.shape)}, the model needs {tuple(shapes[name])}")


def _config_of(options: LoraOptions, config: PretrainedConfig, names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of adapter_config.json."""
    targets: Any = options.target_modules
    if targets == ALL_LINEAR:  # in words of the model: peft looks for linear layers again, in whatever it is loaded on
        targets = sorted({name.split(".")[-3] for name in names if is_adapter_name(name)})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": options.r,
        "lora_alpha": int(options.lora_alpha) if options.lora_alpha.is_integer() else options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "use_rslora": options.use_rslora,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "modules_to_save": list(options.modules_to_save) or None,
        "fan_in_fan_out": traits_of(config.model_type).fan_in_fan_out,
        "bias": "none",
    }


def _in_file(name: str) -> str:
    return name if is_adapter_name(name) else STORED_PREFIX + name


def _in_run(name: str) -> str:
    return name if ".lora_" in name else name.removeprefix(STORED_PREFIX)
