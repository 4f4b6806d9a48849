"""A model of some layers of another: which ones, and what its tensors are called."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PretrainedConfig

from skippipe.checkpoint.layer_choice import read_choice
from skippipe.errors import InputError
from skippipe.model.architecture import num_layers

BY_PLACE: Mapping[str, object] = {
    "scale_attn_by_inverse_layer_idx": False,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}
"""Options by which a layer computes according to its place, and the value under which none does."""


def kept_layers_of(choice: Path, config: PretrainedConfig) -> tuple[int, ...]:
    """Return the layers of a choice's file; raise `InputError` where a Hugging Face model cannot consist of them."""
    found = read_choice(choice)
    found.require_depth(num_layers(config), choice)
    layers = found.whole_layers(choice)
    for option, value in BY_PLACE.items():
        given = getattr(config, option, value)
        if (given or value) != value and layers != tuple(range(num_layers(config))):
            raise InputError(
                f"{choice}: what a layer of this model computes depends on its place ({option}={given}), which changes "
                "where layers are left out; export the whole model"
            )
    return layers


class LayerNames:
    """The names that tensors of some layers have in the model of those alone."""

    def __init__(self, layers_prefix: str, layers: Sequence[int]) -> None:
        self._prefix = layers_prefix + "."
        self._place_of = {layer: place for place, layer in enumerate(layers)}

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors under their new names, without those of layers left out."""
        renamed = {}
        for name, tensor in tensors.items():
            if not name.startswith(self._prefix):
                renamed[name] = tensor
                continue
            layer, rest = name.removeprefix(self._prefix).split(".", maxsplit=1)
            if int(layer) in self._place_of:
                renamed[f"{self._prefix}{self._place_of[int(layer)]}.{rest}"] = tensor
        return renamed
