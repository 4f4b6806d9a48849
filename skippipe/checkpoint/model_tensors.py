"""The parameters of a checkpoint: with its adapters, or merged into those of the model without any."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from skippipe.checkpoint.reader import (
    Metadata,
    check_model,
    load_file,
    load_tensors,
    parts_of,
    read_metadata,
    where_the_rest_is,
)
from skippipe.config.lora_options import LoraOptions
from skippipe.errors import CheckpointError
from skippipe.model.architecture_traits import ArchitectureTraits
from skippipe.model.linear.lora import factor_names, is_adapter_name, merged_weight
from skippipe.model.stage import Stage


def load_parameters(directory: Path, config: PretrainedConfig, stages: Iterable[Stage]) -> Metadata:
    """Load a checkpoint's parameters into `stages`, whatever their split, and return its metadata.

    Adapters of the checkpoint are merged into the weights of a stage that has none; a stage's adapters stay as they are
    where the checkpoint has none. Raises `CheckpointError` where a file is missing, truncated or edited, or where the
    checkpoint is of another model.
    """
    metadata = read_metadata(directory)
    check_model(directory, metadata, config)
    for stage in stages:
        tensors = load_model_tensors(directory, _with_factors(stage.global_parameters()))
        adapters = stage.adapters()
        tensors = adapters | tensors if adapters else merged(tensors, metadata.lora, stage.traits)
        try:
            stage.load_global(tensors)
        except CheckpointError as reason:
            raise CheckpointError(f"{directory}: {reason}{where_the_rest_is(directory, metadata)}") from None
    return metadata


def check_adapters(directory: Path, metadata: Metadata, lora: LoraOptions) -> None:
    """Raise `CheckpointError` where a checkpoint cannot be trained on with these adapters.

    Before the first step there may be none, and adapters may be merged to train all weights.
    """
    wanted, stored = lora.identity() if lora.enabled else {"r": 0}, metadata.lora or {"r": 0}
    if stored == wanted or (metadata.step == 0 and 0 in (stored["r"], wanted["r"])):
        return
    key = next(key for key in ("r", *wanted, *stored) if stored.get(key) != wanted.get(key))
    remedy = f"continue with lora.{key}={stored.get(key)}" if key in stored else "leave lora out"
    raise CheckpointError(
        f"lora.{key}: {wanted.get(key)}, but {directory} was trained with {stored.get(key)}; {remedy}, or export the "
        "run and import it into a new one"
    )


def _with_factors(names: Iterable[str]) -> set[str]:
    """Return the names of parameters and of the adapters that they may have."""
    return {name for own in names for name in (own, *factor_names(own))}


def load_model_tensors(directory: Path, parameters: Iterable[str]) -> dict[str, Tensor]:
    """Return the named parameters of a checkpoint, as far as there are any, wherever they are stored."""
    wanted = set(parameters)
    tensors: dict[str, Tensor] = {}
    for part, metadata in parts_of(directory):
        tensors |= load_tensors(part, metadata, "model", wanted - tensors.keys())
    return tensors


def trained_tensors(directory: Path) -> dict[str, Tensor]:
    """Return the parameters in a checkpoint's own files."""
    metadata = read_metadata(directory)
    names = [name for name in sorted(metadata.files) if name.startswith("model")]
    return {key: tensor for name in names for key, tensor in load_file(directory, metadata, name).items()}


def plain_stages(directory: Path, traits: ArchitectureTraits) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    """Yield the files of a checkpoint's parameters, of one stage each, with those of the model without adapters."""
    (_, own), *others = parts_of(directory)
    trained = trained_tensors(directory) if others else {}
    whole, metadata = others[0] if others else (directory, own)
    for name in sorted(name for name in metadata.files if name.startswith("model")):
        stored = load_file(whole, metadata, name)
        changed = {key: tensor for key, tensor in trained.items() if key in stored or is_adapter_name(key)}
        yield whole / name, merged(stored | changed, own.lora, traits)


def merged(
    tensors: Mapping[str, Tensor], lora: Mapping[str, Any] | None, traits: ArchitectureTraits
) -> dict[str, Tensor]:
    """Return parameters as those of the model without adapters: each adapter of `tensors` in its layer's weight."""
    plain = {name: tensor for name, tensor in tensors.items() if not is_adapter_name(name)}
    if lora is None:
        return plain
    scaling = LoraOptions.model_validate(lora).scaling
    for name, weight in plain.items():
        down, up = (tensors.get(factor) for factor in factor_names(name))
        if down is not None and up is not None:
            plain[name] = merged_weight(weight, down, up, scaling, transposed=traits.fan_in_fan_out)
    return plain
