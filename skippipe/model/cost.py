"""What one microbatch costs on a layer and on the ends, in FLOP and bytes, from the configuration alone."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from skippipe.model.activation_checkpointing import Mode
from skippipe.model.architecture import num_layers
from skippipe.model.skeleton import Skeleton, build_skeleton, is_layer_of
from skippipe.model.weight_gradients import is_deferrable, output_size, weight_of

EAGER_SCORE_BYTES = 8
"""What eager attention keeps for each head and pair of tokens, measured in fp32 and bf16."""


@dataclass(frozen=True)
class ModelCost:
    """Per microbatch of `micro_batch_size` samples of `sequence_length` tokens; layers are averaged."""

    num_layers: int
    layer_parameters: int
    ends_parameters: int
    layer_forward_flop: float
    """2 FLOP per parameter and token, plus attention scores and values over the causal half."""
    loss_flop: float
    """Head and loss, forward and backward (three times the forward)."""
    activation_bytes: int
    """Hidden state of one microbatch, (B, T, D), in the run's dtype."""
    layer_resident_bytes: int
    """What one layer keeps between forward and backward, an estimate (`_layer_saved_bytes`, selective or full)."""
    working_bytes: int
    """What a backward holds besides, once: all that a layer saves while it is computed again."""
    backward_to_forward: float
    """FLOP of a layer's backward relative to its forward; with its forward once more where it is computed again."""
    weight_to_forward: float
    """FLOP of the weight gradients that can be put off (`weight_gradients.py`), relative to a layer's forward."""
    weight_resident_bytes: int
    """What one layer keeps between its input gradient and its weight gradients, an estimate."""
    ends_resident_bytes: int
    """Peak of the loss, three (B, T, V) in fp32 (log-probabilities and two gradients), and the embedded input."""


def model_cost(
    config: PretrainedConfig, micro_batch_size: int, sequence_length: int, dtype: torch.dtype, mode: Mode = "none"
) -> ModelCost:
    """Return the cost of the model; built on the meta device, so no weights take memory.

    `mode` is the activation checkpointing. In a mixture of experts only the active share of each layer's experts counts
    as computed.
    """
    skeleton = build_skeleton(config, dtype)
    layer_parameters = ends_parameters = expert_parameters = 0
    for name, parameter in skeleton.model.named_parameters():
        if is_layer_of(name, skeleton) is None:
            ends_parameters += parameter.numel()
        else:
            layer_parameters += parameter.numel()
            expert_parameters += parameter.numel() if ".experts." in name else 0
    layers = num_layers(config)
    tokens = micro_batch_size * sequence_length
    active = (layer_parameters - expert_parameters * (1 - _active_share(config))) / layers
    deferrable = sum(weight_of(module).numel() for module in _deferrable(skeleton))
    attention_flop = 2 * sequence_length * tokens * _attention_width(config)  # scores and values, causal half of 4 T²W
    activation_bytes = tokens * config.hidden_size * dtype.itemsize
    head_flop = 2 * tokens * config.hidden_size * config.vocab_size
    saved_bytes = _layer_saved_bytes(skeleton, micro_batch_size, sequence_length, dtype)
    kept_bytes = {
        "none": saved_bytes,
        "selective": min(saved_bytes, _layer_selected_bytes(config, tokens, dtype)),
        "full": activation_bytes,
    }
    return ModelCost(
        num_layers=layers,
        layer_parameters=layer_parameters // layers,
        ends_parameters=ends_parameters,
        layer_forward_flop=2 * active * tokens + attention_flop,
        loss_flop=3 * head_flop,
        activation_bytes=activation_bytes,
        layer_resident_bytes=kept_bytes[mode],
        working_bytes=0 if mode == "none" else saved_bytes,
        backward_to_forward=3.0 if mode == "full" else 2.0,
        weight_to_forward=2 * tokens * deferrable / (2 * active * tokens + attention_flop),
        weight_resident_bytes=_weight_kept_bytes(skeleton, tokens, dtype),
        ends_resident_bytes=2 * activation_bytes + 12 * tokens * config.vocab_size,
    )


def _layer_saved_bytes(skeleton: Skeleton, micro_batch_size: int, sequence_length: int, dtype: torch.dtype) -> int:
    """Estimate what autograd keeps for one layer, from the sizes of what its parts save for the backward.

    Per token: eight attention-sized tensors (queries, keys, values, rotated, output), input and output of each norm
    (in lower precision the input once more in fp32), four FFN-sized tensors for each active expert. Against
    saved-tensor hooks on the 13 architectures (D 256, T 128, fp32 and bf16) it is 0.87 to 1.73 times the truth.
    """
    config = skeleton.model.config
    tokens = micro_batch_size * sequence_length
    norms = sum("Norm" in type(module).__name__ for module in skeleton.layers[0].modules())
    norm_size = norms * (2 if dtype.itemsize >= 4 else 4) * config.hidden_size
    ffn_size = 4 * _ffn_width(config) * (getattr(config, "num_experts_per_tok", None) or 1)
    resident = tokens * dtype.itemsize * (8 * _attention_width(config) + norm_size + ffn_size)
    if config._attn_implementation == "eager":
        resident += EAGER_SCORE_BYTES * config.num_attention_heads * sequence_length * tokens
    return int(resident)


def _layer_selected_bytes(config: PretrainedConfig, tokens: int, dtype: torch.dtype) -> int:
    """Estimate what selective checkpointing keeps: the input and the results of all matrix products and of attention.

    Per token: queries, keys, values and their attention, three hidden-sized tensors (input and both outputs), two
    FFN-sized ones for each active expert; without sdpa also the scores of each head and pair of tokens.
    """
    ffn_size = 2 * _ffn_width(config) * (getattr(config, "num_experts_per_tok", None) or 1)
    return int(tokens * dtype.itemsize * (4 * _attention_width(config) + 3 * config.hidden_size + ffn_size))


def _deferrable(skeleton: Skeleton) -> list[nn.Module]:
    """Return the parts of the first layer whose weight gradient can be put off; attention scores have no weights."""
    return [module for module in skeleton.layers[0].modules() if is_deferrable(module)]


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
    names = ("moe_intermediate_size", "intermediate_size", "n_inner")
    return int(next((size for name in names if (size := getattr(config, name, None))), 4 * config.hidden_size))


def _active_share(config: PretrainedConfig) -> float:
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return config.num_experts_per_tok / experts if experts else 1.0
