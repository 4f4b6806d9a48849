"""The cost of a microbatch against real parameters."""

import pytest
import torch
from tiny_models import CPU, stages_of, tiny
from torch.utils.flop_counter import FlopCounterMode

from skippipe.config.lora_options import LoraOptions
from skippipe.model.architecture_traits import ARCHITECTURES
from skippipe.model.cost import model_cost
from skippipe.model.full_model import build_full
from skippipe.model.stage import build_stage


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_is_counted_once(architecture: str) -> None:
    config = tiny(architecture)
    cost = model_cost(config, 2, 16, torch.bfloat16)
    layers = [stage.global_parameters() for stage in stages_of(config, [1, 2, 3])[:1]]
    assert cost.layer_parameters == sum(parameter.numel() for parameter in layers[0].values())
    total = sum(parameter.numel() for parameter in build_full(config, 0, CPU).parameters())
    assert cost.layer_parameters * cost.num_layers + cost.embedding_and_head_parameters == total
    assert cost.activation_bytes == 2 * 16 * 32 * 2


def test_flop_of_a_dense_layer_by_hand() -> None:
    cost = model_cost(tiny("llama"), 2, 16, torch.float32)
    tokens, matrices = 2 * 16, 4 * 32 * 32 + 3 * 32 * 64
    assert cost.layer_forward_flop == 2 * tokens * (matrices + 2 * 32) + 2 * 2 * 16 * 16 * 32
    assert cost.loss_flop == 3 * 2 * tokens * 32 * 64


def test_wide_heads_and_active_experts_count() -> None:
    narrow, wide = (model_cost(tiny("qwen3", head_dim=size), 1, 16, torch.float32) for size in (16, 64))
    parameters_flop = 2 * 16 * (wide.layer_parameters - narrow.layer_parameters)
    assert wide.layer_forward_flop - narrow.layer_forward_flop == parameters_flop + 2 * 16 * 16 * 2 * (64 - 16)
    few, many = (model_cost(tiny("mixtral", num_local_experts=number), 1, 16, torch.float32) for number in (4, 8))
    assert many.layer_parameters > 1.5 * few.layer_parameters
    assert many.layer_forward_flop == pytest.approx(few.layer_forward_flop, rel=0.02)


def test_layers_of_unlike_size_are_averaged() -> None:
    config = tiny("qwen3_moe", mlp_only_layers=[0])
    cost = model_cost(config, 1, 16, torch.float32)
    sizes = [sum(p.numel() for p in stage.parameters()) for stage in stages_of(config, [1, 2, 3, 4])]
    total = sum(parameter.numel() for parameter in build_full(config, 0, CPU).parameters())
    assert cost.layer_parameters != sizes[0]
    assert cost.layer_parameters == (total - cost.embedding_and_head_parameters) // 4


def test_frozen_weights_cost_no_weight_gradients() -> None:
    config, lora = tiny("llama", tie_word_embeddings=False), LoraOptions(r=4)
    cost = model_cost(config, 2, 16, torch.float32, lora=lora)
    whole = {"with_embedding_and_head": True, "seed": 0, "device": CPU, "dtype": torch.float32}
    stage = build_stage(config, 0, 4, **whole, lora=lora)  # type: ignore[arg-type]  # of several types
    trained = sum(parameter.numel() for parameter in stage.trained_parameters().values())
    assert (cost.layer_trained_parameters * 4, cost.embedding_and_head_trained_parameters) == (trained, 0)
    total = sum(parameter.numel() for parameter in stage.parameters())
    assert cost.layer_parameters * 4 + cost.embedding_and_head_parameters == total
    hidden = torch.zeros(2, 16, 32, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        output = stage(hidden)
    with FlopCounterMode(display=False) as backward:
        output.backward(output.detach())
    assert 4 * cost.layer_forward_flop == pytest.approx(forward.get_total_flops(), rel=0.05)
    ratio = backward.get_total_flops() / forward.get_total_flops()
    assert cost.backward_to_forward == pytest.approx(ratio, rel=0.08)
    assert 1 < cost.backward_to_forward < 1.6
    with FlopCounterMode(display=False) as loss:
        stage.loss(hidden, torch.zeros(2, 16, dtype=torch.int64)).backward()
    assert cost.loss_flop == loss.get_total_flops()
