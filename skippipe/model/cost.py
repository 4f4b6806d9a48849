"""What one microbatch costs on a layer and on the ends, in FLOP and bytes, from the configuration alone."""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from skippipe.model.skeleton import build_skeleton, is_layer_of

RESIDENT_FACTOR = 16
"""Hidden-state-sized tensors that autograd keeps for one decoder layer (norms, projections, gated FFN), an estimate
that errs on the large side for a gated FFN of four times the hidden size with fused attention."""


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
    """Autograd memory that one layer keeps between forward and backward, an estimate."""
    ends_resident_bytes: int
    """Logits in fp32 with their gradient, and the embedded input."""


def model_cost(config: PretrainedConfig, micro_batch_size: int, sequence_length: int, dtype: torch.dtype) -> ModelCost:
    """Return the cost of the model; built on the meta device, so no weights take memory.

    In a mixture of experts only the active share of each layer's experts counts as computed.
    """
    skeleton = build_skeleton(config, dtype)
    layer_parameters = ends_parameters = expert_parameters = 0
    for name, parameter in skeleton.model.named_parameters():
        if is_layer_of(name, skeleton) is None:
            ends_parameters += parameter.numel()
        else:
            layer_parameters += parameter.numel()
            expert_parameters += parameter.numel() if ".experts." in name else 0
    num_layers = config.num_hidden_layers
    tokens = micro_batch_size * sequence_length
    active = (layer_parameters - expert_parameters * (1 - _active_share(config))) / num_layers
    attention_flop = 2 * sequence_length * tokens * config.hidden_size  # scores and values, causal half of 4 T²D
    activation_bytes = tokens * config.hidden_size * dtype.itemsize
    head_flop = 2 * tokens * config.hidden_size * config.vocab_size
    return ModelCost(
        num_layers=num_layers,
        layer_parameters=layer_parameters // num_layers,
        ends_parameters=ends_parameters,
        layer_forward_flop=2 * active * tokens + attention_flop,
        loss_flop=3 * head_flop,
        activation_bytes=activation_bytes,
        layer_resident_bytes=RESIDENT_FACTOR * activation_bytes,
        ends_resident_bytes=2 * activation_bytes + 8 * tokens * config.vocab_size,
    )


def _active_share(config: PretrainedConfig) -> float:
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return config.num_experts_per_tok / experts if experts else 1.0
