"""The memory that fake tensors promise, against that of real ones on every architecture."""

import time
import weakref
from typing import Any

import pytest
import torch
from tiny_models import CPU, tiny
from torch import Tensor
from transformers import PretrainedConfig

from skippipe.config.lora_options import LoraOptions
from skippipe.model import chunked_loss
from skippipe.model.activations.activation_checkpointing import Mode, enable
from skippipe.model.activations.activation_memory import ActivationCase, activation_memory, forget_gradient
from skippipe.model.activations.live_memory import LiveMemory
from skippipe.model.architecture_traits import ARCHITECTURES
from skippipe.model.stage import Stage, build_stage

SHAPE = 2, 32
LAYERS = 4
MODES_ASKED = [("float32", "none"), ("bfloat16", "selective"), ("float32", "full")]
OF_ALL_MODES = {"llama", "gpt2", "gemma3_text", "qwen3_moe"}
"""Plain, with learned positions, with two kinds of layers, a mixture of experts; the others are like these."""
CASES = [
    pytest.param(
        architecture,
        *asked,
        marks=() if asked[1] == "none" or architecture in OF_ALL_MODES else pytest.mark.extended,
    )
    for architecture in ARCHITECTURES
    for asked in MODES_ASKED
]


def real_stage(config: PretrainedConfig, dtype: torch.dtype, mode: Mode, lora: LoraOptions | None = None) -> Stage:
    whole: dict[str, Any] = {"with_embedding_and_head": True, "seed": 0, "device": CPU, "dtype": dtype}
    stage = build_stage(config, 0, LAYERS, **whole, lora=lora).train()
    enable(stage, mode)
    for parameter in stage.trained_parameters().values():
        parameter.register_post_accumulate_grad_hook(forget_gradient)
    return stage


def body_bytes(stage: Stage, hidden_size: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return what a forward keeps, and how much more there is at the peak."""
    with LiveMemory() as live:
        hidden = torch.empty(*SHAPE, hidden_size, dtype=dtype).normal_().requires_grad_()  # (B, T, D)
        output = stage(hidden)
        kept = live.live_bytes
        torch.autograd.backward(output, torch.ones_like(output))
        return kept, live.peak_bytes - kept


def saved_bytes(stage: Stage, hidden_size: int, dtype: torch.dtype) -> int:
    """Return what autograd saves for a forward, and its input and output, by saved-tensor hooks."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    storages: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    hidden = torch.empty(*SHAPE, hidden_size, dtype=dtype).normal_().requires_grad_()  # (B, T, D)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        keep(stage(keep(hidden)).detach())
    return sum(tensor.untyped_storage().nbytes() for address, tensor in storages.items() if address not in parameters)


def loss_bytes(stage: Stage, config: PretrainedConfig, dtype: torch.dtype) -> int:
    with LiveMemory() as live:
        hidden = torch.empty(*SHAPE, config.hidden_size, dtype=dtype).normal_().requires_grad_()  # (B, T, D)
        stage.loss(hidden, torch.randint(0, config.vocab_size, SHAPE)).backward()
        peak_bytes: int = live.peak_bytes
        return peak_bytes


@pytest.mark.parametrize(("architecture", "dtype_name", "mode"), CASES)
def test_estimate_is_what_real_tensors_take(architecture: str, dtype_name: str, mode: Mode) -> None:
    config, dtype = tiny(architecture), getattr(torch, dtype_name)
    estimate = activation_memory(ActivationCase(config, *SHAPE, dtype, mode))
    stage = real_stage(config, dtype, mode)
    kept, working = body_bytes(stage, config.hidden_size, dtype)
    assert estimate.stage_bytes + LAYERS * estimate.layer_bytes == pytest.approx(kept, rel=0.01)
    if mode == "none":  # else checkpointing has hooks of its own
        assert kept == pytest.approx(saved_bytes(stage, config.hidden_size, dtype), rel=0.01)
    assert estimate.working_bytes == pytest.approx(working, rel=0.12)
    assert estimate.embedding_and_head_working_bytes >= 0.99 * loss_bytes(stage, config, dtype)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_adapters_keep_less_than_whole_weights(mode: Mode) -> None:
    config, lora = tiny("llama", tie_word_embeddings=False), LoraOptions(r=2)
    dtype = torch.float32
    estimate = activation_memory(ActivationCase(config, *SHAPE, dtype, mode, lora))
    stage = real_stage(config, dtype, mode, lora)
    kept, working = body_bytes(stage, config.hidden_size, dtype)
    assert estimate.stage_bytes + LAYERS * estimate.layer_bytes == pytest.approx(kept, rel=0.01)
    assert estimate.working_bytes == pytest.approx(working, rel=0.12)
    real = loss_bytes(stage, config, dtype)
    assert real <= estimate.embedding_and_head_working_bytes
    whole = activation_memory(ActivationCase(config, *SHAPE, dtype, mode))
    assert estimate.embedding_and_head_working_bytes < whole.embedding_and_head_working_bytes


def test_head_of_a_large_vocabulary_is_the_peak_of_an_origin() -> None:
    config = tiny("llama", vocab_size=2048)
    estimate = activation_memory(ActivationCase(config, *SHAPE, torch.float32, "none"))
    real = loss_bytes(real_stage(config, torch.float32, "none"), config, torch.float32)
    assert estimate.embedding_and_head_working_bytes == pytest.approx(real, rel=0.01)
    assert real > 3 * SHAPE[0] * SHAPE[1] * 2048 * 4
    assert estimate.working_bytes < estimate.embedding_and_head_working_bytes


def test_logits_of_an_origin_are_those_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_TOKENS", 8)
    config = tiny("llama", vocab_size=4096)
    estimate = activation_memory(ActivationCase(config, *SHAPE, torch.float32, "full"))
    real = loss_bytes(real_stage(config, torch.float32, "full"), config, torch.float32)
    assert estimate.embedding_and_head_working_bytes == pytest.approx(real, rel=0.01)
    head_bytes = 4096 * config.hidden_size * 4
    assert 2 * head_bytes < real < 2 * head_bytes + 4 * 8 * 4096 * 4


def test_large_model_is_quick_and_asked_once() -> None:
    config = tiny(
        "llama",
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        num_key_value_heads=32,
        num_hidden_layers=32,
    )
    case = ActivationCase(config, 4, 4096, torch.bfloat16, "full")
    estimate = activation_memory(case)
    assert estimate.layer_bytes >= 4 * 4096 * 4096 * 2
    start_s = time.perf_counter()
    assert activation_memory(case) is estimate
    assert time.perf_counter() - start_s < 0.5


def test_storage_counts_once_and_until_its_last_tensor_is_gone() -> None:
    before = torch.zeros(2, 3)
    with LiveMemory() as live:
        whole = torch.empty(1000)
        part = whole[:10].view(2, 5)
        assert live.live_bytes == 4000
        alive = weakref.ref(whole)
        del whole
        assert alive() is None or isinstance(alive(), Tensor)
        assert live.live_bytes == 4000
        del part
        assert live.live_bytes == 0
        assert live.peak_bytes == 4000
        view = before.t()
        assert view.shape == (3, 2)
        assert live.live_bytes == 0
