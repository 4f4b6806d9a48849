"""The model's configuration: a Hugging Face decoder chosen by name, its options checked."""

import difflib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from skippipe.errors import ConfigError

ARCHITECTURES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gpt2",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "gpt_neox",
    "granite",
    "mixtral",
    "qwen3_moe",
)
"""Architectures whose split into stages is tested to be exact. Others may share state across layers."""

DROPOUTS = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")
"""Off unless asked for: dropout would make the same run differ between one process and several."""

TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
UNRELATED = ("transformers_version", "_name_or_path", "architectures", "torch_dtype", "dtype")


def build_config(architecture: str, options: Mapping[str, object]) -> PretrainedConfig:
    """Return the configuration of `architecture` with `options`.

    Raises `ConfigError` for an architecture that cannot be split, an option that its configuration does not have
    (naming the nearest one) or a value that it refuses.
    """
    if architecture not in ARCHITECTURES:
        close = difflib.get_close_matches(architecture, ARCHITECTURES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(
            f"model.architecture: {architecture!r} cannot be split into stages; {hint}"
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    config_class = CONFIG_MAPPING[architecture]
    defaults = config_class()
    known = {*defaults.to_dict(), *defaults.attribute_map}
    for key in options:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"model.options: {architecture} has no option {key!r}{hint}")
    given = dict(options)
    for key in TOKEN_IDS:
        given.setdefault(key, None)
    for key in DROPOUTS:
        if key in known:
            given.setdefault(key, 0.0)
    if "num_key_value_heads" in known and "num_attention_heads" in given:
        given.setdefault("num_key_value_heads", given["num_attention_heads"])
    try:
        config = config_class(**given)
    except Exception as reason:  # the configuration classes raise many kinds of error
        raise ConfigError(f"model.options: {architecture} refuses them ({' '.join(str(reason).split())})") from None
    _check_heads(config, architecture)
    config.use_cache = False
    return config


def config_from_directory(directory: Path) -> PretrainedConfig:
    """Read config.json of a local Hugging Face directory; nothing is downloaded and no code of it is run."""
    if not (directory / "config.json").is_file():
        raise ConfigError(f"model.directory: {directory} has no config.json")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as reason:
        raise ConfigError(f"model.directory: {directory}/config.json: {' '.join(str(reason).split())}") from None
    if config.model_type not in ARCHITECTURES:
        raise ConfigError(
            f"model.directory: {directory} is a {config.model_type!r}, which cannot be split into stages; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    config.use_cache = False
    return config


def fingerprint(config: PretrainedConfig) -> str:
    """Return 16 hexadecimal digits that identify the model's shape and computation, not its weights."""
    content = {key: value for key, value in config.to_dict().items() if key not in UNRELATED}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _check_heads(config: PretrainedConfig, architecture: str) -> None:
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if config.hidden_size % heads and getattr(config, "head_dim", None) is None:
        raise ConfigError(
            f"model.options: hidden_size {config.hidden_size} does not divide by num_attention_heads {heads}"
        )
    if groups and heads % groups:
        raise ConfigError(
            f"model.options of {architecture}: num_attention_heads {heads} does not divide by "
            f"num_key_value_heads {groups}"
        )
