"""Tiny decoders of every architecture, for the tests of the model package."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from skippipe.config.lora_options import LoraOptions
from skippipe.model.architecture import build_config
from skippipe.model.full_model import build_full
from skippipe.model.stage import Stage, build_stage

CPU = torch.device("cpu")
SIZES: dict[str, object] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "intermediate_size": 64,
}
GEMMA: dict[str, object] = {
    "head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 4,
}
EXTRA: dict[str, dict[str, object]] = {
    "gpt2": {"n_inner": 64},
    "qwen3": {"head_dim": 16, "num_key_value_heads": 1},
    "mistral": {"sliding_window": 4},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32},
}


def tiny(architecture: str, **options: object) -> PretrainedConfig:
    sizes = {key: value for key, value in SIZES.items() if (architecture, key) != ("gpt2", "intermediate_size")}
    return build_config(architecture, {**sizes, **EXTRA.get(architecture, {}), **options})


def stages_of(
    config: PretrainedConfig,
    bounds: Sequence[int],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    lora: LoraOptions | None = None,
) -> list[Stage]:
    given: dict[str, Any] = {"seed": seed, "device": CPU, "dtype": dtype, "lora": lora}
    return [
        build_stage(config, first, last, with_embedding_and_head=first == 0, **given)
        for first, last in pairwise(bounds)
    ]


def move_off_zero(stages: Sequence[Stage]) -> dict[str, Tensor]:
    """Give weights to every B of adapters, so that A has gradients; return all trained tensors."""
    trained = {name: parameter for stage in stages for name, parameter in stage.trained_parameters().items()}
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in sorted(trained):
            if ".lora_B." in name:
                trained[name].copy_(torch.randn(trained[name].shape, generator=generator) * 0.1)
    return {name: parameter.detach() for name, parameter in trained.items()}


def hugging_face(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the model as transformers itself builds it, buffers and all, with our initial weights."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(build_full(config, 0, CPU, dtype).state_dict())
    return model


def samples(seed: int = 0) -> tuple[Tensor, Tensor]:
    text = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(seed))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def walk(stages: Sequence[Stage], order: Sequence[int], input_ids: Tensor) -> Tensor:
    hidden = stages[0].embed(input_ids)
    for index in order:
        hidden = stages[index](hidden)
    return hidden
