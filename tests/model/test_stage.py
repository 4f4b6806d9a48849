"""Stages against the whole Hugging Face model: equal to the bit, whatever the architecture and the split."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from skippipe.errors import CheckpointError
from skippipe.model.architecture import ARCHITECTURES, build_config
from skippipe.model.full import build_full
from skippipe.model.stage import Stage, build_stage

CPU = torch.device("cpu")
SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 64}
EXTRA: dict[str, dict[str, object]] = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 32},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0},
}


def tiny(architecture: str, **options: object) -> PretrainedConfig:
    return build_config(architecture, {**SIZES, **EXTRA.get(architecture, {}), **options})


def stages_of(config: PretrainedConfig, bounds: list[int], seed: int = 0) -> list[Stage]:
    return [
        build_stage(config, first, last, ends=first == 0, seed=seed, device=CPU, dtype=torch.float32)
        for first, last in itertools.pairwise(bounds)
    ]


def tokens(seed: int = 0) -> tuple[Tensor, Tensor]:
    text = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(seed))
    return text[:, :-1], text[:, 1:]


def chain_loss(stages: list[Stage], order: list[int], input_ids: Tensor, labels: Tensor) -> Tensor:
    hidden = stages[0].embed(input_ids)
    for index in order:
        hidden = stages[index](hidden)
    return stages[0].loss(hidden, labels)


def full_loss(model: nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_ids=input_ids).logits.float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_chain_of_stages_equals_the_whole_model(architecture: str) -> None:
    config = tiny(architecture)
    stages, full = stages_of(config, [0, 1, 3, 4]), build_full(config, 0, CPU)
    input_ids, labels = tokens()
    ours, theirs = chain_loss(stages, [0, 1, 2], input_ids, labels), full_loss(full, input_ids, labels)
    assert ours.item() == theirs.item()
    ours.backward()
    theirs.backward()
    gradients = {name: parameter.grad for stage in stages for name, parameter in stage.global_parameters().items()}
    expected = dict(full.named_parameters())
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name].grad, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("order", [[0, 2, 3], [0, 2, 1, 3], [0, 3]])
def test_skips_and_swaps_equal_the_rearranged_model(architecture: str, order: list[int]) -> None:
    config = tiny(architecture)
    full = build_full(config, 0, CPU)
    base = full.base_model
    name = next(name for name, child in base.named_children() if isinstance(child, nn.ModuleList))
    setattr(base, name, nn.ModuleList(getattr(base, name)[index] for index in order))
    base.config = copy.copy(config)
    base.config.num_hidden_layers = len(order)
    if getattr(config, "layer_types", None):
        base.config.layer_types = [config.layer_types[index] for index in order]
    input_ids, labels = tokens()
    ours = chain_loss(stages_of(config, [0, 1, 2, 3, 4]), order, input_ids, labels)
    assert ours.item() == full_loss(full, input_ids, labels).item()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe"])
def test_initial_weights_do_not_depend_on_the_split(architecture: str) -> None:
    config = tiny(architecture)
    coarse = {name: value for stage in stages_of(config, [0, 4]) for name, value in stage.state_dict_global().items()}
    fine = {
        name: value for stage in stages_of(config, [0, 1, 2, 4]) for name, value in stage.state_dict_global().items()
    }
    other_seed = stages_of(config, [0, 4], seed=1)[0].state_dict_global()
    assert coarse.keys() == fine.keys()
    assert all(torch.equal(coarse[name], fine[name]) for name in coarse)
    assert any(not torch.equal(coarse[name], other_seed[name]) for name in coarse)


def test_layers_differ_from_each_other() -> None:
    state = stages_of(tiny("llama"), [0, 4])[0].state_dict_global()
    first, second = (state[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1))
    assert not torch.equal(first, second)


def test_gpt2_residual_projections_are_scaled_with_depth() -> None:
    shallow, deep = (
        stages_of(tiny("gpt2", num_hidden_layers=layers, hidden_size=128), [0, 1])[0].state_dict_global()
        for layers in (2, 32)
    )
    ratio = shallow["transformer.h.0.mlp.c_proj.weight"].std() / deep["transformer.h.0.mlp.c_proj.weight"].std()
    assert ratio.item() == pytest.approx(4.0, rel=0.05)


def test_a_stage_holds_only_its_own_weights() -> None:
    stage = stages_of(tiny("llama"), [0, 1, 3, 4])[1]
    names = {name.split(".")[2] for name in stage.global_parameters()}
    assert names == {"1", "2"}
    held = sum(parameter.numel() for parameter in stage.parameters() if not parameter.is_meta)
    assert held == sum(parameter.numel() for parameter in stage.global_parameters().values())
    assert not any(tensor.is_meta for tensor in (*stage.parameters(), *stage.buffers()))


def test_tied_embeddings_are_one_parameter() -> None:
    tied, untied = (stages_of(tiny("llama", tie_word_embeddings=tie), [0, 4])[0] for tie in (True, False))
    assert "lm_head.weight" not in tied.global_parameters()
    assert "lm_head.weight" in untied.global_parameters()
    input_ids, labels = tokens()
    chain_loss([tied], [0], input_ids, labels).backward()
    gradient = tied.global_parameters()["model.embed_tokens.weight"].grad
    assert gradient is not None
    assert (gradient.abs().sum(dim=1) > 0).all(), "tokens that are not in the input get their gradient from the head"


def test_loading_checks_names_and_shapes() -> None:
    stage = stages_of(tiny("llama"), [0, 4])[0]
    state = {name: torch.ones_like(value) for name, value in stage.state_dict_global().items()}
    stage.load_global(state)
    assert all((value == 1).all() for value in stage.state_dict_global().values())
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: shape \(3,\)"):
        stage.load_global(state | {"model.norm.weight": torch.ones(3)})
    del state["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: missing"):
        stage.load_global(state)
