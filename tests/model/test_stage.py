"""Stages against the whole Hugging Face model: equal to the bit, whatever the architecture and the split."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from tiny_models import CPU, hugging_face, samples, stages_of, tiny, walk
from torch import Tensor, nn
from transformers import PreTrainedModel

from skippipe.errors import CheckpointError
from skippipe.model.architecture_traits import ARCHITECTURES
from skippipe.model.full_model import build_full
from skippipe.model.stage import build_stage

ORDERS = [(0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1), (0, 2), (0,)]
"""The plain order, a swap, a skip with a swap, two skips, and stage 0 alone."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_chain_of_stages_equals_the_whole_model(architecture: str, dtype: torch.dtype) -> None:
    config = tiny(architecture)
    stages, full = stages_of(config, [0, 1, 3, 4], dtype=dtype), hugging_face(config, dtype)
    input_ids, labels = samples()
    hidden = walk(stages, [0, 1, 2], input_ids)
    assert torch.equal(stages[0].logits(hidden), full(input_ids=input_ids).logits)
    ours = stages[0].loss(hidden, labels)
    theirs = full(input_ids=input_ids, labels=labels, shift_labels=labels).loss
    assert ours.dtype == torch.float32
    assert ours.item() == theirs.item()
    torch.autograd.backward(ours)
    torch.autograd.backward(theirs)
    gradients = {name: parameter.grad for stage in stages for name, parameter in stage.global_parameters().items()}
    expected = {name: parameter.grad for name, parameter in full.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient is not None
        assert torch.equal(gradient, expected[name]), name


def rearranged(model: PreTrainedModel, order: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Return logits of the whole model with its layers in this order, made by hand, without the code under test."""
    full = copy.deepcopy(model)
    base, config = full.base_model, model.config
    name = next(name for name, child in base.named_children() if isinstance(child, nn.ModuleList))
    setattr(base, name, nn.ModuleList(getattr(base, name)[index] for index in order))
    base.config = copy.copy(config)
    base.config.num_hidden_layers = len(order)
    if getattr(config, "layer_types", None):
        base.config.layer_types = [config.layer_types[index] for index in order]
    return lambda input_ids: full(input_ids=input_ids).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_skips_and_swaps_equal_the_rearranged_model(architecture: str) -> None:
    config = tiny(architecture)
    stages, full, (input_ids, _) = stages_of(config, [0, 1, 2, 3, 4]), hugging_face(config), samples()
    results = []
    with torch.no_grad():
        for order in ORDERS:
            results.append(stages[0].logits(walk(stages, order, input_ids)))
            assert torch.equal(results[-1], rearranged(full, order)(input_ids)), order
    distinct = {result.numpy().tobytes() for result in results}
    assert len(distinct) == len(ORDERS), "the order must matter, or this test shows nothing"


def test_dropout_falls_where_the_whole_model_has_it() -> None:
    config = tiny("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    stages, full, (input_ids, _) = stages_of(config, [0, 2, 4]), build_full(config, 0, CPU), samples()
    full.train()
    torch.manual_seed(1)
    ours = stages[0].logits(walk(stages, [0, 1], input_ids))
    torch.manual_seed(1)
    assert torch.equal(ours, full(input_ids=input_ids).logits)
    for stage in stages:
        stage.eval()
    full.eval()
    calm = stages[0].logits(walk(stages, [0, 1], input_ids))
    assert torch.equal(calm, full(input_ids=input_ids).logits)
    assert not torch.equal(calm, ours)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_router_logits_are_left_out(architecture: str) -> None:
    stages, (input_ids, labels) = stages_of(tiny(architecture, output_router_logits=True), [0, 4]), samples()
    plain = stages_of(tiny(architecture), [0, 4])
    loss, expected = (s[0].loss(walk(s, [0], input_ids), labels).item() for s in (stages, plain))
    assert loss == expected


def test_a_stage_holds_only_its_own_weights() -> None:
    stage = stages_of(tiny("llama"), [0, 1, 3, 4])[1]
    assert {name.split(".")[2] for name in stage.global_parameters()} == {"1", "2"}
    held = {id(parameter) for parameter in stage.parameters()}
    assert held == {id(parameter) for parameter in stage.global_parameters().values()}
    assert not any(tensor.is_meta for tensor in (*stage.parameters(), *stage.buffers()))


def test_nothing_is_allocated_for_the_layers_of_others() -> None:
    with torch.profiler.profile(profile_memory=True) as profile:
        stage = stages_of(tiny("llama", num_hidden_layers=40, intermediate_size=512), [39, 40])[0]
    own_bytes = sum(parameter.nbytes for parameter in stage.parameters())
    allocated_bytes = sum(
        event.self_cpu_memory_usage for event in profile.events() or () if event.self_cpu_memory_usage > 0
    )
    assert own_bytes <= allocated_bytes < 4 * own_bytes


def test_tied_embeddings_are_one_parameter() -> None:
    tied, untied = (stages_of(tiny("llama", tie_word_embeddings=tie), [0, 4])[0] for tie in (True, False))
    assert "lm_head.weight" not in tied.global_parameters()
    assert "lm_head.weight" in untied.global_parameters()
    input_ids, labels = samples()
    torch.autograd.backward(tied.loss(walk([tied], [0], input_ids), labels))
    gradient = tied.global_parameters()["model.embed_tokens.weight"].grad
    assert gradient is not None
    assert (gradient.abs().sum(dim=1) > 0).all(), "tokens that are not in the input get their gradient from the head"


def test_loading_checks_names_and_shapes_before_it_copies() -> None:
    stage = stages_of(tiny("llama"), [0, 4])[0]
    ones = {name: torch.ones_like(value) for name, value in stage.state_dict_global().items()}
    missing = {name: value for name, value in ones.items() if name != "model.norm.weight"}
    before = {name: value.clone() for name, value in stage.state_dict_global().items()}
    for tensors, message in [
        (missing, r"model\.norm\.weight: missing"),
        (ones | {"model.norm.weight": torch.ones(3)}, r"model\.norm\.weight: shape \(3,\), the model has \(32,\)"),
        (ones | {"model.layers.9.weight": torch.ones(3)}, r"model\.layers\.9\.weight: no such"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            stage.load_global(tensors)
        assert all(torch.equal(value, before[name]) for name, value in stage.state_dict_global().items())
    stage.load_global(ones)
    assert all((value == 1).all() for value in stage.state_dict_global().values())


def test_loaded_weights_are_the_ones_that_are_used() -> None:
    config, (input_ids, _) = tiny("gpt2"), samples()
    ours = build_stage(config, 0, 4, with_embedding_and_head=True, seed=1, device=CPU, dtype=torch.float32)
    ours.load_global(
        build_stage(
            config, 0, 4, with_embedding_and_head=True, seed=0, device=CPU, dtype=torch.float32
        ).state_dict_global()
    )
    assert torch.equal(ours.logits(walk([ours], [0], input_ids)), hugging_face(config)(input_ids=input_ids).logits)
