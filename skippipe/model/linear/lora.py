"""Low-rank adapters beside frozen linear layers: LoRA (Hu et al. 2021, arXiv 2106.09685).

Names of modules, options and stored tensors are those of peft.
"""

import re
import zlib
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from skippipe.config.lora_options import ALL_LINEAR, LoraOptions
from skippipe.errors import ConfigError
from skippipe.model.linear.weight_gradients import input_size, is_deferrable, output_size, weight_of
from skippipe.model.skeleton import Skeleton, is_layer_of

STORED_PREFIX = "base_model.model."
"""Before the names of an adapter's tensors, and of modules that are saved beside it, in peft's files."""
FACTORS = ("lora_A", "lora_B")


class LoraLinear(nn.Module):
    """A linear layer of n inputs and m outputs, and beside it a product of rank r that is added to it."""

    def __init__(self, base_layer: nn.Module, options: LoraOptions) -> None:
        super().__init__()
        weight = weight_of(base_layer)
        thin = partial(nn.Linear, bias=False, device=weight.device, dtype=weight.dtype)
        self.base_layer = base_layer
        self.lora_dropout = nn.Dropout(options.lora_dropout) if options.lora_dropout > 0 else nn.Identity()
        self.lora_A = thin(input_size(base_layer), options.r)
        self.lora_B = thin(options.r, output_size(base_layer))
        self.scaling = options.scaling

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (..., m) for inputs (..., n)."""
        added = self.lora_B(self.lora_A(self.lora_dropout(inputs))) * self.scaling
        output: Tensor = self.base_layer(inputs) + added
        return output

    @torch.no_grad()
    def draw(self, name: str, seed: int) -> None:
        """Give initial weights that follow from the seed and the layer's `name`: A as peft draws it, B zeros."""
        shape = self.lora_A.weight.shape
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(zlib.crc32(f"{seed}/{name}.lora_A".encode()))
            self.lora_A.weight.copy_(nn.init.kaiming_uniform_(torch.empty(shape), a=5**0.5))
        nn.init.zeros_(self.lora_B.weight)


def add_adapters(skeleton: Skeleton, layers: Iterable[int], options: LoraOptions, seed: int) -> None:
    """Freeze the model but for `modules_to_save`, and put adapters beside linear layers of `layers`, in place.

    Weights must have been made before; where there are none, adapters have none either. Raises `ConfigError` where
    options name what the model does not have.
    """
    targets = dict(_targets(skeleton, options))
    saved = _saved_names(skeleton, options)
    both = next((name for name in targets if any(whole.startswith(f"{name}.") for whole in saved)), None)
    if both is not None:
        raise ConfigError(f"lora: {both} is in target_modules and in modules_to_save; leave it out of one of them")
    for name, parameter in skeleton.model.named_parameters():
        parameter.requires_grad_(name in saved)
    wanted = set(layers)
    for name, linear in targets.items():
        if is_layer_of(name, skeleton) in wanted:
            adapted = LoraLinear(linear, options)
            if not weight_of(linear).is_meta:
                adapted.draw(name, seed)
            parent, _, own = name.rpartition(".")
            setattr(skeleton.model.get_submodule(parent), own, adapted)


def plain_name(name: str) -> str:
    """Return the name under which a parameter is stored: an adapter's as in peft, another's as without adapters."""
    is_adapter = any(f".{factor}." in name for factor in FACTORS)
    return STORED_PREFIX + name if is_adapter else name.replace(".base_layer.", ".")


def is_adapter_name(name: str) -> bool:
    """Return whether a stored tensor belongs to an adapter."""
    return name.startswith(STORED_PREFIX)


def factor_names(weight: str) -> tuple[str, str]:
    """Return under which names the adapter of a linear layer's weight is stored, A and B."""
    module = weight.removesuffix(".weight")
    return f"{STORED_PREFIX}{module}.lora_A.weight", f"{STORED_PREFIX}{module}.lora_B.weight"


def merged_weight(weight: Tensor, down: Tensor, up: Tensor, scaling: float, *, transposed: bool) -> Tensor:
    """Return the weight of a linear layer with its adapter's product in it, in the weight's dtype.

    A is `down` (r, n), B is `up` (m, r), the weight (m, n), or (n, m) where it is `transposed` (Conv1D).
    """
    product = scaling * (up.float() @ down.float())
    return (weight.float() + (product.t() if transposed else product)).to(weight.dtype)


def _targets(skeleton: Skeleton, options: LoraOptions) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of every linear layer that gets an adapter; each decoder layer has at least one."""
    chosen = {name: module for name, module in skeleton.model.named_modules() if _is_chosen(name, module, options)}
    linear = {name for name, module in chosen.items() if is_deferrable(module)}
    inside = {name: is_layer_of(name, skeleton) for name in linear}
    wrong = next((name for name in chosen if inside.get(name) is None), None)
    if options.target_modules == ALL_LINEAR:
        wrong = None
    if wrong is not None:
        raise ConfigError(
            f"lora.target_modules: {wrong} is no linear layer inside the decoder's layers; "
            "name it in lora.modules_to_save to train it whole"
        )
    without = next((layer for layer in range(len(skeleton.layers)) if layer not in inside.values()), None)
    if without is not None:
        layer = skeleton.layers[without]
        linear_names = [name for name, module in layer.named_modules() if is_deferrable(module)]
        raise ConfigError(
            f"lora.target_modules: nothing in layer {without} is called so, and every layer needs an adapter; its "
            f"linear layers are {', '.join(linear_names)}"
        )
    return ((name, chosen[name]) for name, layer in inside.items() if layer is not None)


def _is_chosen(name: str, module: nn.Module, options: LoraOptions) -> bool:
    targets = options.target_modules
    if targets == ALL_LINEAR:
        return is_deferrable(module)
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in targets)


def _saved_names(skeleton: Skeleton, options: LoraOptions) -> set[str]:
    """Return the parameters of `modules_to_save`: as in peft, also of modules whose last name ends so."""
    modules = dict(skeleton.model.named_modules())
    for end in options.modules_to_save:
        if not any(name.endswith(end) for name in modules):
            raise ConfigError(f"lora.modules_to_save: the model has no module whose name ends with {end!r}")
    chosen = {name for name in modules if name.endswith(options.modules_to_save)}
    outputs, inputs = skeleton.model.get_output_embeddings(), skeleton.model.get_input_embeddings()
    if skeleton.model.config.tie_word_embeddings and any(modules[name] in (outputs, inputs) for name in chosen):
        raise ConfigError(
            "lora.modules_to_save: embedding and head of this model are one tensor, which peft cannot save beside an "
            "adapter; leave them out, or train all weights (lora.r: 0)"
        )
    return {f"{name}.{own}" for name in chosen for own, _ in modules[name].named_parameters()}
