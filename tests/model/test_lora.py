"""Adapters beside frozen layers: merged, drawn and frozen alike in every split."""

import pytest
import torch
from tiny_models import move_off_zero, samples, stages_of, tiny, walk

from skippipe.config.lora_options import LoraOptions
from skippipe.errors import ConfigError
from skippipe.model.architecture_traits import TRAITS
from skippipe.model.linear.lora import STORED_PREFIX, factor_names, merged_weight

OPTIONS = LoraOptions(r=4, lora_alpha=8)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_merged_weights_compute_what_adapters_add(architecture: str) -> None:
    config = tiny(architecture)
    (stage,) = stages_of(config, (0, 4), lora=OPTIONS)
    move_off_zero([stage])
    tensors = stage.state_dict_global()
    transposed = TRAITS[architecture].fan_in_fan_out
    plain = {name: tensor.clone() for name, tensor in tensors.items() if not name.startswith(STORED_PREFIX)}
    for name, weight in plain.items():
        down, up = (tensors.get(factor) for factor in factor_names(name))
        if down is not None and up is not None:
            plain[name] = merged_weight(weight, down, up, OPTIONS.scaling, transposed=transposed)
    (merged,) = stages_of(config, (0, 4))
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
    (whole,) = stages_of(config, (0, 4), lora=OPTIONS)
    split = stages_of(config, (0, 1, 3, 4), lora=OPTIONS)
    drawn = whole.state_dict_global()
    again = {name: tensor for stage in split for name, tensor in stage.state_dict_global().items()}
    assert drawn.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in drawn.items())
    first, second = (drawn[f"{STORED_PREFIX}model.layers.{layer}.mlp.up_proj.lora_A.weight"] for layer in (0, 1))
    assert not torch.equal(first, second)
    assert not any(tensor.any() for name, tensor in drawn.items() if ".lora_B." in name)
    plain = {name for stage in stages_of(config, (0, 4)) for name in stage.global_parameters()}
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
        stages_of(tiny("llama", tie_word_embeddings=True), (0, 4), lora=given)
