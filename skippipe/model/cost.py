"""What one microbatch costs on a layer, and on embedding and head, in FLOP and bytes, from the configuration alone."""

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from skippipe.config.lora_options import LoraOptions
from skippipe.model.activations.activation_checkpointing import Mode
from skippipe.model.architecture import num_experts, num_layers
from skippipe.model.architecture_traits import traits_of
from skippipe.model.linear.lora import add_adapters
from skippipe.model.linear.weight_gradients import is_deferrable, output_size, weight_of
from skippipe.model.skeleton import Skeleton, build_skeleton, is_layer_of


@dataclass(frozen=True)
class ModelCost:
    """Per microbatch of `micro_batch_size` samples of `sequence_length` tokens; layers are averaged."""

    num_layers: int
    layer_parameters: int
    layer_trained_parameters: int
    """Those of them that training changes: all, unless adapters are trained."""
    embedding_and_head_parameters: int
    embedding_and_head_trained_parameters: int
    layer_forward_flop: float
    """2 FLOP per parameter and token, plus attention scores and values over the causal half."""
    ffn_share: float
    """Part of a layer's forward FLOP that is its feed-forward block's."""
    loss_flop: float
    """Head and loss, forward and backward (three times the forward, twice where the head is frozen)."""
    activation_bytes: int
    """Hidden state of one microbatch, (B, T, D), in the run's dtype."""
    backward_to_forward: float
    """FLOP of a layer's backward relative to its forward; with its forward once more where it is computed again.

    Frozen weights have no gradient to compute: then it is about 1 instead of 2.
    """
    weight_to_forward: float
    """FLOP of the weight gradients that can be put off (`weight_gradients.py`), relative to a layer's forward."""
    weight_resident_bytes: int
    """What one layer keeps between its input gradient and its weight gradients, an estimate."""
    layer_shapes: tuple[tuple[int, ...], ...]
    """Shapes of the parameters of all layers that are trained."""
    embedding_and_head_shapes: tuple[tuple[int, ...], ...]


def model_cost(
    config: PretrainedConfig,
    micro_batch_size: int,
    sequence_length: int,
    dtype: torch.dtype,
    mode: Mode = "none",
    lora: LoraOptions | None = None,
) -> ModelCost:
    """Return the cost of the model; built on the meta device, so no weights take memory.

    What activations take is asked of `activation_memory`, which runs the layers for it.

    `mode` is the activation checkpointing; with `lora` adapters are trained, and all else is frozen. In a mixture of
    experts only the active share of each layer's experts counts as computed.
    """
    skeleton = build_skeleton(config, dtype)
    layers = num_layers(config)
    if lora is not None and lora.enabled:
        add_adapters(skeleton, range(layers), lora, seed=0)
    parameters = dict(skeleton.model.named_parameters())
    of_layers = {name: own for name, own in parameters.items() if is_layer_of(name, skeleton) is not None}
    of_embedding_and_head = {name: own for name, own in parameters.items() if name not in of_layers}
    trained = {name for name, own in parameters.items() if own.requires_grad}
    layer_shapes = _shapes(of_layers, trained)
    embedding_and_head_shapes = _shapes(of_embedding_and_head, trained)
    tokens = micro_batch_size * sequence_length
    active = _active_parameters(skeleton, of_layers) / layers
    frozen = (
        _active_parameters(skeleton, {name: own for name, own in of_layers.items() if name not in trained}) / layers
    )
    deferrable = sum(weight_of(module).numel() for module in _deferrable(skeleton))
    attention_flop = 2 * sequence_length * tokens * _attention_width(config)  # scores and values, causal half of 4 T²W
    activation_bytes = tokens * config.hidden_size * dtype.itemsize
    head_flop = 2 * tokens * config.hidden_size * config.vocab_size
    head_trained = skeleton.model.get_output_embeddings().weight.requires_grad
    layer_forward_flop = 2 * active * tokens + attention_flop
    backward_flop = 2 * layer_forward_flop - 2 * frozen * tokens
    return ModelCost(
        num_layers=layers,
        layer_parameters=_count(_shapes(of_layers)) // layers,
        layer_trained_parameters=_count(layer_shapes) // layers,
        embedding_and_head_parameters=_count(_shapes(of_embedding_and_head)),
        embedding_and_head_trained_parameters=_count(embedding_and_head_shapes),
        layer_forward_flop=layer_forward_flop,
        ffn_share=tokens * token_cost(skeleton).ffn_flop / layer_forward_flop,
        loss_flop=(3 if head_trained else 2) * head_flop,
        activation_bytes=activation_bytes,
        backward_to_forward=backward_flop / layer_forward_flop + (mode == "full"),
        weight_to_forward=2 * tokens * deferrable / layer_forward_flop,
        weight_resident_bytes=_weight_kept_bytes(skeleton, tokens, dtype),
        layer_shapes=layer_shapes,
        embedding_and_head_shapes=embedding_and_head_shapes,
    )


@dataclass(frozen=True)
class TokenCost:
    """FLOP of one token's forward on one layer, layers averaged; attention grows with the positions before it."""

    linear_flop: float
    """All matrix products: 2 FLOP per parameter that the token meets."""
    ffn_flop: float
    """The part of the matrix products that belongs to the feed-forward block."""
    attention_flop: float
    """Scores and values with one position."""

    def layer_flop(self, positions: int) -> float:
        """Return the FLOP of a token that attends to so many positions, its own included."""
        return self.linear_flop + positions * self.attention_flop


def token_cost(skeleton: Skeleton) -> TokenCost:
    """Return what one token costs on a layer of the model, with the active share of a mixture's experts."""
    config, traits = skeleton.model.config, skeleton.traits
    active = _active_share(config)
    layers = num_layers(config)
    linear = ffn = 0.0
    for name, parameter in skeleton.layers.named_parameters():
        flop = 2 * parameter.numel() * (active if f".{traits.experts}." in name else 1.0) / layers
        linear += flop
        ffn += flop if name.split(".")[1] == traits.feed_forward else 0.0
    return TokenCost(linear, ffn, 4 * _attention_width(config))


def _shapes(parameters: Mapping[str, Tensor], among: Container[str] | None = None) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of parameters, of those whose name is `among` others where given."""
    return tuple(tuple(own.shape) for name, own in parameters.items() if among is None or name in among)


def _active_parameters(skeleton: Skeleton, parameters: Mapping[str, Tensor]) -> float:
    """Return how many numbers of these parameters a token meets: all but of experts that it does not go to."""
    experts = f".{skeleton.traits.experts}."
    inactive = 1 - _active_share(skeleton.model.config)
    of_experts = sum(own.numel() for name, own in parameters.items() if experts in name)
    return sum(own.numel() for own in parameters.values()) - of_experts * inactive


def _count(shapes: Iterable[tuple[int, ...]]) -> int:
    """Return the number of parameters in all of these tensors."""
    return sum(math.prod(shape) for shape in shapes)


def _deferrable(skeleton: Skeleton) -> list[nn.Module]:
    """Return the parts of the first layer whose weight gradient can be put off; attention scores have no weights."""
    modules = (module for module in skeleton.layers[0].modules() if is_deferrable(module))
    return [module for module in modules if weight_of(module).requires_grad]


def _weight_kept_bytes(skeleton: Skeleton, tokens: int, dtype: torch.dtype) -> int:
    """Estimate what products wait with: the gradient of each one's output, and the inputs, of which some are shared.

    Per token: two hidden-sized inputs (attention and FFN), one attention-sized and one FFN-sized.
    """
    config = skeleton.model.config
    outputs = sum(output_size(module) for module in _deferrable(skeleton))
    inputs = 2 * config.hidden_size + _attention_width(config) + _ffn_width(config)
    return int(tokens * dtype.itemsize * (outputs + inputs))


def _attention_width(config: PretrainedConfig) -> int:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_attention_heads * head_dim)


def _ffn_width(config: PretrainedConfig) -> int:
    width: int | None = getattr(config, traits_of(config.model_type).feed_forward_width)
    return width or 4 * int(config.hidden_size)


def _active_share(config: PretrainedConfig) -> float:
    experts = num_experts(config)
    return config.num_experts_per_tok / experts if experts else 1.0
