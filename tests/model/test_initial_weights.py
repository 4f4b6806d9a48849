"""Initial weights follow from the seed and the name alone."""

import pytest
import torch
from tiny_models import CPU, stages_of, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from skippipe.errors import CheckpointError
from skippipe.model.architecture_traits import ARCHITECTURES
from skippipe.model.full_model import build_full, stages_to_full

HALF: dict[str, dict[str, object]] = {
    name: {"layer_types": ["sliding_attention", "full_attention"]} for name in ("gemma2", "gemma3_text")
}


def weights(config: PretrainedConfig, bounds: list[int], seed: int = 0) -> dict[str, Tensor]:
    return {
        name: value for stage in stages_of(config, bounds, seed) for name, value in stage.state_dict_global().items()
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_they_do_not_depend_on_the_split(architecture: str) -> None:
    config = tiny(architecture)
    coarse, fine, whole = weights(config, [0, 4]), weights(config, [0, 1, 2, 4]), build_full(config, 0, CPU)
    assert coarse.keys() == fine.keys() == dict(whole.named_parameters()).keys()
    for name, parameter in whole.named_parameters():
        assert torch.equal(coarse[name], parameter), name
        assert torch.equal(fine[name], parameter), name
    other = weights(config, [0, 4], seed=1)
    assert all(coarse[name].std() == 0 or not torch.equal(coarse[name], other[name]) for name in coarse)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_they_are_spread_as_hugging_face_spreads_them(architecture: str) -> None:
    config = tiny(architecture, hidden_size=128, num_hidden_layers=2, **HALF.get(architecture, {}))
    ours = dict(build_full(config, 0, CPU).named_parameters())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = AutoModelForCausalLM.from_config(config)
    for name, theirs in reference.named_parameters():
        assert ours[name].std().item() == pytest.approx(theirs.std().item(), rel=0.15, abs=1e-6), name
        assert ours[name].mean().item() == pytest.approx(theirs.mean().item(), abs=0.01), name


def test_layers_differ_from_each_other() -> None:
    state = weights(tiny("llama"), [0, 4])
    assert not torch.equal(*(state[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1)))


def test_gpt2_residual_projections_are_scaled_with_depth() -> None:
    shallow, deep = (
        stages_of(tiny("gpt2", num_hidden_layers=layers, hidden_size=128), [0, 1])[0].state_dict_global()
        for layers in (2, 32)
    )
    name = "transformer.h.0.mlp.c_proj.weight"
    assert (shallow[name].std() / deep[name].std()).item() == pytest.approx(4.0, rel=0.05)


def test_drawing_them_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    build_full(tiny("llama"), 0, CPU)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_stages_are_put_together_again(architecture: str) -> None:
    config = tiny(architecture)
    stages = stages_of(config, [0, 1, 3, 4], seed=5)
    full = stages_to_full(config, reversed(stages))
    expected = build_full(config, 5, CPU).state_dict()
    assert full.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in full.state_dict().items())
    with pytest.raises(CheckpointError, match="missing"):
        stages_to_full(config, stages[:2])
    with pytest.raises(CheckpointError, match="held by two stages"):
        stages_to_full(config, [*stages, stages[1]])
