"""Configurations: what is accepted, what is refused and how it is said, and what identifies a model."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import SIZES, tiny
from transformers import AutoConfig

from skippipe.errors import ConfigError
from skippipe.model.architecture import (
    attention_in_use,
    build_config,
    config_from_directory,
    config_to_json,
    fingerprint,
    num_layers,
)
from skippipe.model.architecture_traits import ARCHITECTURES, TRAITS
from skippipe.model.skeleton import build_skeleton


@pytest.mark.parametrize(
    ("architecture", "options", "expected"),
    [
        ("lama", {}, "did you mean 'llama'.*supported: llama, qwen2"),
        ("gemma3n", {}, "layers share state"),
        ("t5", {}, "'t5' cannot be split"),
        ("llama", {"hiden_size": 3}, "no option 'hiden_size'; did you mean 'hidden_size'"),
        ("llama", {"hidden_size": 33, "num_attention_heads": 4, "head_dim": None}, "33"),
        ("llama", {**SIZES, "num_key_value_heads": 3}, "num_key_value_heads 3"),
        ("llama", {"hidden_size": "wide"}, "refuses"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0, at least 1"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads is 0, at least 1"),
        ("gpt2", {"n_head": 0}, "num_attention_heads is 0, at least 1"),
        ("llama", {"vocab_size": -1}, "vocab_size is -1, at least 1"),
        ("llama", {"hidden_act": "foo"}, "cannot be built.*foo"),
        ("gemma2", {"hidden_act": "gelu"}, "no option 'hidden_act'; did you mean 'hidden_activation'"),
        ("llama", {"model_type": "mistral"}, "of model_type 'mistral', model.architecture is 'llama'"),
        ("mixtral", {**SIZES, "num_local_experts": 2, "num_experts_per_tok": 3}, "is 3, there are 2 experts"),
    ],
)
def test_mistakes_are_explained(architecture: str, options: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as error:
        build_config(architecture, options)
    assert "\n" not in str(error.value)


def test_names_of_hugging_face_and_of_the_architecture_are_both_known() -> None:
    for options in ({"hidden_size": 24, "num_hidden_layers": 2}, {"n_embd": 24, "n_layer": 2}):
        config = build_config("gpt2", options)
        assert (config.hidden_size, num_layers(config)) == (24, 2)


def test_dropout_is_off_unless_asked_for() -> None:
    assert tiny("gpt2").resid_pdrop == 0.0
    assert tiny("gpt2", resid_pdrop=0.1).resid_pdrop == 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropout_of_a_directory_is_off(architecture: str, tmp_path: Path) -> None:
    options = dict.fromkeys(TRAITS[architecture].dropout_options, 0.1)
    tiny(architecture, **options).save_pretrained(tmp_path)
    assert config_to_json(config_from_directory(tmp_path)) == config_to_json(tiny(architecture))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_configuration_is_read_back_as_the_same_model(architecture: str, tmp_path: Path) -> None:
    config = tiny(architecture)
    assert config.use_cache is False
    config.save_pretrained(tmp_path)
    again = config_from_directory(tmp_path)
    assert config_to_json(again) == config_to_json(config)
    assert fingerprint(again) == fingerprint(config)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, r"no config\.json"),
        ('{"model_type": "t5"}', "'t5' cannot be split"),
        ('{"model_type": "llama"', "config.json"),
        ('{"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 0}', "is 0"),
        ('{"model_type": "nothing-known"}', "nothing-known"),
    ],
)
def test_a_bad_directory_is_explained(content: str | None, expected: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=expected) as error:
        config_from_directory(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_fingerprint_tells_models_apart() -> None:
    assert fingerprint(tiny("llama")) == fingerprint(tiny("llama"))
    others = [tiny("llama", vocab_size=65), tiny("llama", tie_word_embeddings=True), tiny("qwen2")]
    assert len({fingerprint(config) for config in (tiny("llama"), *others)}) == 4
    assert json.loads(config_to_json(tiny("llama")))["hidden_size"] == 32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_is_sdpa_where_the_architecture_allows_it(architecture: str) -> None:
    built = build_skeleton(tiny(architecture), torch.float32).model.config
    assert attention_in_use(built).split()[0] == ("eager" if architecture == "gemma2" else "sdpa")


LLAMA_3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
PUBLISHED: dict[str, dict[str, object]] = {
    "llama": {"rope_theta": 500000.0, "rope_scaling": LLAMA_3, "pretraining_tp": 1, "torch_dtype": "bfloat16"},
    "qwen2": {"rope_theta": 1e6, "max_window_layers": 21, "use_mrope": False, "use_sliding_window": False},
    "qwen3": {"rope_theta": 1000000, "rope_scaling": None, "max_window_layers": 28, "sliding_window": None},
    "mistral": {"rope_theta": 1e6, "sliding_window": None, "head_dim": 16, "torch_dtype": "bfloat16"},
    "gemma2": {"rope_theta": 5e4, "hidden_act": "gelu", "hidden_activation": "gelu", "cache_implementation": "hybrid"},
    "gemma3_text": {"rope_theta": 1e6, "rope_local_base_freq": 5e3, "sliding_window_pattern": 2, "rope_scaling": None},
    "phi3": {"rope_theta": 5e4, "partial_rotary_factor": 0.5, "attention_dropout": 0.0},
    "gpt_neox": {"rotary_emb_base": 5e4, "rotary_pct": 0.5},
    "qwen3_moe": {"rope_theta": 1e6, "rope_scaling": None, "max_window_layers": 48},
}
"""What published config.json files hold beside sizes, in spellings of their own time."""


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_spellings_of_published_configurations_mean_what_they_mean_in_transformers(architecture: str) -> None:
    options = {**SIZES, **PUBLISHED[architecture]}
    theirs = AutoConfig.for_model(architecture, **options)
    ours = build_config(architecture, options)
    for key in ("rope_parameters", "layer_types", "sliding_window", "hidden_activation"):
        assert getattr(ours, key, None) == getattr(theirs, key, None), key
    assert ours.rope_parameters != build_config(architecture, SIZES).rope_parameters
