"""Configurations and their cost."""

from pathlib import Path

import pytest
import torch

from skippipe.errors import ConfigError
from skippipe.model.architecture import build_config, config_from_directory, fingerprint
from skippipe.model.cost import model_cost
from skippipe.model.full import build_full

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100}


@pytest.mark.parametrize(
    ("architecture", "options", "expected"),
    [
        ("lama", {}, "did you mean 'llama'"),
        ("gemma3n", {}, "cannot be split"),
        ("llama", {"hiden_size": 3}, "did you mean 'hidden_size'"),
        ("llama", {"hidden_size": 33, "num_attention_heads": 4, "head_dim": None}, "33"),
        ("llama", {**SIZES, "num_key_value_heads": 3}, "num_key_value_heads 3"),
        ("llama", {"hidden_size": "wide"}, "refuses"),
    ],
)
def test_mistakes_are_explained(architecture: str, options: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        build_config(architecture, options)


def test_directory_is_read_and_checked(tmp_path: Path) -> None:
    config = build_config("llama", SIZES)
    config.save_pretrained(tmp_path)
    assert fingerprint(config_from_directory(tmp_path)) == fingerprint(config)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        config_from_directory(tmp_path / "missing")
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ConfigError, match="'t5'"):
        config_from_directory(tmp_path)


def test_fingerprint_tells_models_apart() -> None:
    assert fingerprint(build_config("llama", SIZES)) == fingerprint(build_config("llama", SIZES))
    assert fingerprint(build_config("llama", SIZES)) != fingerprint(build_config("llama", SIZES | {"vocab_size": 101}))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_cost_counts_every_parameter(architecture: str) -> None:
    config = build_config(architecture, SIZES)
    cost = model_cost(config, 2, 16, torch.float32)
    total = sum(parameter.numel() for parameter in build_full(config, 0, torch.device("cpu")).parameters())
    assert cost.layer_parameters * cost.num_layers + cost.ends_parameters == total
    assert cost.activation_bytes == 2 * 16 * 32 * 4


def test_cost_scales_with_tokens_and_counts_active_experts() -> None:
    config = build_config("llama", SIZES)
    one, two = (model_cost(config, batch, 16, torch.bfloat16) for batch in (1, 2))
    assert two.layer_forward_flop == 2 * one.layer_forward_flop
    assert two.loss_flop == 2 * one.loss_flop == 2 * 3 * 2 * 16 * 32 * 100
    sparse = model_cost(build_config("mixtral", SIZES | {"num_local_experts": 8}), 1, 16, torch.float32)
    assert sparse.layer_forward_flop < 2 * 16 * sparse.layer_parameters
