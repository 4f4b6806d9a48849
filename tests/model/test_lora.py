"""Adapters beside frozen layers: what peft computes, drawn and frozen alike in every split."""

from itertools import pairwise

import pytest
import torch
from tiny_models import CPU, hugging_face, samples, tiny, walk
from torch import Tensor
from transformers import PretrainedConfig

from skippipe.config.lora_options import LoraOptions
from skippipe.errors import ConfigError
from skippipe.model.architecture_traits import TRAITS
from skippipe.model.linear.lora import STORED_PREFIX, factor_names, merged_weight
from skippipe.model.stage import Stage, build_stage

OPTIONS = LoraOptions(r=4, lora_alpha=8)
RSLORA = LoraOptions(r=4, use_rslora=True, target_modules=r".*\.(q_proj|down_proj)", modules_to_save=("norm",))


def stages_with(config: PretrainedConfig, bounds: tuple[int, ...], options: LoraOptions = OPTIONS) -> list[Stage]:
    return [
        build_stage(
            config,
            first,
            last,
            with_embedding_and_head=first == 0,
            seed=0,
            device=CPU,
            dtype=torch.float32,
            lora=options,
        )
        for first, last in pairwise(bounds)
    ]


def moved_off_zero(stages: list[Stage]) -> dict[str, Tensor]:
    """Give every B weights, so that A has gradients; return all trained tensors."""
    trained = {name: parameter for stage in stages for name, parameter in stage.trained_parameters().items()}
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in sorted(trained):
            if ".lora_B." in name:
                trained[name].copy_(torch.randn(trained[name].shape, generator=generator) * 0.1)
    return {name: parameter.detach() for name, parameter in trained.items()}


@pytest.mark.parametrize(("architecture", "options"), [("llama", OPTIONS), ("gpt2", OPTIONS), ("llama", RSLORA)])
def test_gradients_are_those_of_peft(architecture: str, options: LoraOptions) -> None:
    peft = pytest.importorskip("peft")
    config = tiny(architecture, tie_word_embeddings=False)
    stages = stages_with(config, (0, 1, 4), options)
    tensors = moved_off_zero(stages)
    targets = options.target_modules
    given = peft.LoraConfig(
        r=4,
        lora_alpha=options.lora_alpha,
        use_rslora=options.use_rslora,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(options.modules_to_save) or None,
        task_type="CAUSAL_LM",
        fan_in_fan_out=TRAITS[architecture].fan_in_fan_out,
    )
    model = peft.get_peft_model(hugging_face(config), given)
    own = {name if name.startswith(STORED_PREFIX) else STORED_PREFIX + name: tensor for name, tensor in tensors.items()}
    assert own.keys() == peft.get_peft_model_state_dict(model).keys()
    peft.set_peft_model_state_dict(model, own)
    input_ids, labels = samples()
    expected = torch.nn.functional.cross_entropy(model(input_ids).logits.flatten(0, 1), labels.flatten())
    expected.backward()
    loss = stages[0].loss(walk(stages, (0, 1), input_ids), labels)
    loss.backward()
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)
    theirs = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    mine = {name: parameter.grad for stage in stages for name, parameter in stage.trained_parameters().items()}
    assert len(mine) == len(theirs)
    for name, gradient in theirs.items():
        stored = name.replace(".default", "").replace(".modules_to_save", "")
        found = mine[stored if ".lora_" in stored else stored.removeprefix(STORED_PREFIX)]
        assert found is not None
        assert torch.allclose(found, gradient, atol=1e-5, rtol=0), name
    frozen = [parameter for stage in stages for parameter in stage.parameters() if not parameter.requires_grad]
    assert frozen
    assert all(parameter.grad is None for parameter in frozen)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_merged_weights_compute_what_adapters_add(architecture: str) -> None:
    config = tiny(architecture)
    (stage,) = stages_with(config, (0, 4))
    moved_off_zero([stage])
    tensors = stage.state_dict_global()
    transposed = TRAITS[architecture].fan_in_fan_out
    plain = {name: tensor.clone() for name, tensor in tensors.items() if not name.startswith(STORED_PREFIX)}
    for name, weight in plain.items():
        down, up = (tensors.get(factor) for factor in factor_names(name))
        if down is not None and up is not None:
            plain[name] = merged_weight(weight, down, up, OPTIONS.scaling, transposed=transposed)
    (merged,) = stages_with(config, (0, 4), LoraOptions())
    merged.load_global(plain)
    input_ids, _ = samples()
    with torch.no_grad():
        assert torch.allclose(
            merged.logits(walk([merged], [0], input_ids)), stage.logits(walk([stage], [0], input_ids)), atol=1e-4
        )
        merged.load_global({name: tensor for name, tensor in tensors.items() if name in plain})
        assert not torch.allclose(merged(merged.embed(input_ids)), stage(stage.embed(input_ids)), atol=1e-3)


def test_initial_adapters_follow_from_seed_and_name_in_every_split() -> None:
    config = tiny("llama")
    (whole,) = stages_with(config, (0, 4))
    split = stages_with(config, (0, 1, 3, 4))
    drawn = whole.state_dict_global()
    again = {name: tensor for stage in split for name, tensor in stage.state_dict_global().items()}
    assert drawn.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in drawn.items())
    first, second = (drawn[f"{STORED_PREFIX}model.layers.{layer}.mlp.up_proj.lora_A.weight"] for layer in (0, 1))
    assert not torch.equal(first, second)
    assert not any(tensor.any() for name, tensor in drawn.items() if ".lora_B." in name)
    plain = {name for stage in stages_with(config, (0, 4), LoraOptions()) for name in stage.global_parameters()}
    assert {name for name in drawn if not name.startswith(STORED_PREFIX)} == plain
    assert whole.trained_parameters().keys() == drawn.keys() - plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["qproj"]}, "nothing in layer 0 is called so.*its linear layers are self_attn.q_proj"),
        ({"target_modules": r"model\.layers\.[0-2]\.mlp\.up_proj"}, "nothing in layer 3"),
        ({"target_modules": ["lm_head", "q_proj"]}, "lm_head is no linear layer inside"),
        ({"modules_to_save": ["normal"]}, "no module whose name ends with 'normal'"),
        ({"modules_to_save": ["embed_tokens"]}, "one tensor"),
        ({"modules_to_save": ["q_proj"]}, "q_proj is in target_modules and in modules_to_save"),
    ],
)
def test_what_the_model_does_not_have_is_refused(options: dict[str, object], message: str) -> None:
    given = LoraOptions.model_validate({"r": 2, **options})
    with pytest.raises(ConfigError, match=message):
        stages_with(tiny("llama", tie_word_embeddings=True), (0, 4), given)
