"""Activation checkpointing: the same gradients to the bit, less memory held, and a cost that says how much less."""

import gc

import pytest
import torch
from tiny_models import stages_of, tiny
from torch import Tensor, nn
from transformers import PretrainedConfig

from skippipe.errors import ConfigError
from skippipe.model.activations.activation_checkpointing import MODES, Mode, enable
from skippipe.model.activations.activation_memory import ActivationCase, activation_memory
from skippipe.model.architecture_traits import ARCHITECTURES
from skippipe.model.cost import model_cost
from skippipe.model.stage import Stage

SIZES = {"hidden_size": 64, "num_attention_heads": 4}
LONG = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}


def stage_with(config: PretrainedConfig, mode: Mode) -> Stage:
    """Return a stage of two layers in training."""
    stage = stages_of(config, [1, 3])[0]
    enable(stage, mode)
    return stage.train()


def gradients(stage: Stage, hidden: Tensor) -> list[Tensor]:
    """Return the gradients by the input and by every parameter after two microbatches, the second's backward first."""
    inputs = [hidden.clone().requires_grad_(), (2 * hidden).requires_grad_()]
    outputs = [stage(hidden) for hidden in inputs]
    for output in reversed(outputs):
        torch.autograd.backward(output, torch.ones_like(output))
    return [tensor.grad for tensor in (*inputs, *stage.parameters()) if tensor.grad is not None]


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_the_same_to_the_bit(architecture: str, mode: Mode) -> None:
    config = tiny(architecture)
    hidden = torch.randn(2, 16, config.hidden_size, generator=torch.Generator().manual_seed(0))  # (B, T, D)
    expected, found = (gradients(stage_with(config, chosen), hidden) for chosen in ("none", mode))
    assert len(expected) == len(found) > 5
    for plain, again in zip(expected, found, strict=True):
        assert torch.equal(plain, again)


def live_storages() -> dict[int, torch.UntypedStorage]:
    """Return the storages of all tensors that are alive, by address; they live as long as what is returned."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}


def saved_bytes(stage: Stage, hidden: Tensor) -> int:
    """Return what one forward keeps, found by the storages that its graph and its caches hold."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    before = live_storages()  # held, so that nothing of it goes in between
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = stage(hidden)
    after = live_storages()
    assert output.requires_grad
    return sum(storage.nbytes() for address, storage in after.items() if address not in before)


def test_each_mode_keeps_less_and_the_cost_says_how_much() -> None:
    config = tiny("llama", **LONG)
    hidden = torch.randn(2, 64, 192).requires_grad_()  # (B, T, D)
    measured = {mode: saved_bytes(stage_with(config, mode), hidden) for mode in MODES}
    assert measured["full"] < 0.3 * measured["selective"]
    assert measured["selective"] < 0.75 * measured["none"]
    for mode in MODES:
        memory = activation_memory(ActivationCase(config, 2, 64, torch.float32, mode))
        # The hidden state that comes in was there before; each layer's state of the random numbers is not counted.
        estimate = 2 * memory.layer_bytes + memory.stage_bytes - hidden.nbytes
        assert estimate == pytest.approx(measured[mode], rel=0.01, abs=2 * 5056), mode


def test_full_computes_the_forward_again_and_holds_one_layer_while_it_does() -> None:
    config = tiny("llama", **LONG)
    costs = [model_cost(config, 2, 64, torch.float32, mode) for mode in MODES]
    assert [cost.backward_to_forward for cost in costs] == [2, 2, 3]
    none, selective, full = (activation_memory(ActivationCase(config, 2, 64, torch.float32, mode)) for mode in MODES)
    # While a layer is computed again, all that it saves is there.
    assert none.layer_bytes < full.working_bytes < 1.5 * none.layer_bytes + none.working_bytes
    assert costs[2].activation_bytes <= full.layer_bytes < 1.01 * costs[2].activation_bytes
    assert full.layer_bytes < selective.layer_bytes < none.layer_bytes


def test_evaluation_keeps_nothing_and_computes_once() -> None:
    stage = stage_with(tiny("llama"), "full").eval()
    calls = []
    stage.body.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        stage(torch.randn(1, 8, 32))
    assert calls == [1]


def test_layers_that_cannot_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = stages_of(tiny("llama"), [1, 3])[0]
    monkeypatch.setattr(type(stage.body), "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match=r"training\.activation_checkpointing: full: .* use none"):
        enable(stage, "full")
