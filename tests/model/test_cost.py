"""The cost of a microbatch against real parameters and real autograd memory."""

import pytest
import torch
from tiny_models import CPU, EXTRA, stages_of, tiny
from torch import Tensor

from skippipe.model.architecture import ARCHITECTURES
from skippipe.model.cost import model_cost
from skippipe.model.full import build_full
from skippipe.model.stage import Stage


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_is_counted_once(architecture: str) -> None:
    config = tiny(architecture)
    cost = model_cost(config, 2, 16, torch.bfloat16)
    layers = [stage.global_parameters() for stage in stages_of(config, [1, 2, 3])[:1]]
    assert cost.layer_parameters == sum(parameter.numel() for parameter in layers[0].values())
    total = sum(parameter.numel() for parameter in build_full(config, 0, CPU).parameters())
    assert cost.layer_parameters * cost.num_layers + cost.ends_parameters == total
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
    assert cost.layer_parameters == (total - cost.ends_parameters) // 4


def saved_bytes(stage: Stage, hidden: Tensor) -> int:
    """Return what autograd keeps for the forward, each storage once, without the parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    storages: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = stage(hidden)
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for address, tensor in storages.items() if address not in parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resident_bytes_are_near_what_autograd_keeps(architecture: str, dtype: torch.dtype) -> None:
    sizes: dict[str, object] = {"hidden_size": 192, "num_attention_heads": 4}
    if "head_dim" in EXTRA.get(architecture, {}):
        sizes["head_dim"] = 48
    if "num_key_value_heads" in EXTRA.get(architecture, {}):
        sizes["num_key_value_heads"] = 4
    for name in ("n_inner", "moe_intermediate_size"):
        if name in EXTRA.get(architecture, {}):
            sizes[name] = 512
    if architecture != "gpt2":
        sizes["intermediate_size"] = 512
    config = tiny(architecture, **sizes)
    stage = stages_of(config, [1, 3], dtype=dtype)[0]
    hidden = torch.randn(2, 64, 192, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    measured = saved_bytes(stage, hidden) / 2
    assert 0.85 * measured < model_cost(config, 2, 64, dtype).layer_resident_bytes < 1.8 * measured
