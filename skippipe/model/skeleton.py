"""A Hugging Face decoder on the meta device, its parts found, and its weights made part by part.

Initial weights follow from the seed and the module's name alone, so that they are the same for every split.
"""

import copy
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from skippipe.errors import ConfigError
from skippipe.model.architecture_traits import ArchitectureTraits, traits_of


@dataclass(frozen=True)
class Skeleton:
    """The whole model without weights, and what its architecture calls its parts."""

    model: PreTrainedModel
    base: PreTrainedModel
    """The model without its head."""
    traits: ArchitectureTraits

    @property
    def layers_prefix(self) -> str:
        """Full name of the list of layers, such as model.layers."""
        return f"{self.model.base_model_prefix}.{self.traits.layers}"

    @property
    def layers(self) -> nn.ModuleList:
        """All decoder layers."""
        layers: nn.ModuleList = getattr(self.base, self.traits.layers)
        return layers


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype) -> Skeleton:
    """Return the model of `config` on the meta device; raise `ConfigError` where its parts cannot be found."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return find_parts(model)


def find_parts(model: PreTrainedModel) -> Skeleton:
    """Return where the parts of `model` are; raise `ConfigError` where they are not found."""
    base, config = model.base_model, model.config
    traits = traits_of(config.model_type)
    layers = getattr(base, traits.layers, None)
    found = isinstance(layers, nn.ModuleList) and len(layers) == config.num_hidden_layers
    if not found or not hasattr(base, traits.final_norm):
        raise ConfigError(
            f"model: {config.model_type!r} of transformers {version('transformers')} has no {config.num_hidden_layers} "
            f"decoder layers in {traits.layers!r} with a final norm {traits.final_norm!r} behind them; "
            "install another release of transformers"
        )
    return Skeleton(model, base, traits)


def build_one_layer(config: PretrainedConfig) -> PreTrainedModel:
    """Return the model with its first layer alone, on the meta device; cheap, to learn whether it can be built."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(shortened(config, (0,)))
    return model


def shortened(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """Return a copy of `config` for a model of only these layers, in this order."""
    copied = copy.copy(config)
    copied.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        copied.layer_types = [config.layer_types[index] for index in layers]
    return copied


def is_layer_of(name: str, skeleton: Skeleton) -> int | None:
    """Return which layer the parameter or module `name` belongs to, None for embedding, final norm and head."""
    prefix = skeleton.layers_prefix + "."
    if not name.startswith(prefix):
        return None
    return int(name.removeprefix(prefix).split(".", maxsplit=1)[0])


def materialise(
    skeleton: Skeleton, layers: Iterable[int], *, with_embedding_and_head: bool, seed: int, device: torch.device
) -> None:
    """Give weights to the chosen layers, and to everything outside them `with_embedding_and_head`, in place.

    Weights are drawn on the CPU under a seed made from `seed` and the module's name, then moved to `device`.
    """
    wanted = set(layers)
    for name, module in _children_first(skeleton.model):
        layer = is_layer_of(name, skeleton)
        inside = layer in wanted if layer is not None else with_embedding_and_head or skeleton.traits.rotation in name
        if not inside or isinstance(module, PreTrainedModel) or module is skeleton.layers:
            continue
        module.to_empty(device="cpu", recurse=False)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            skeleton.model._init_weights(module)
    for module in skeleton.model.modules():
        if any(not tensor.is_meta for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            module._apply(lambda tensor: tensor.to(device), recurse=False)
    if with_embedding_and_head and skeleton.model.config.tie_word_embeddings:
        skeleton.model.get_output_embeddings().weight = skeleton.model.get_input_embeddings().weight


def _children_first(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List modules with every child before its parent: some parents set weights of their children again."""
    return sorted(model.named_modules(), key=lambda entry: -entry[0].count("."))
