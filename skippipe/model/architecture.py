"""The model's configuration: a Hugging Face decoder chosen by name, its options checked."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from skippipe.config.experiment import Experiment
from skippipe.data.tokenizer import vocabulary_size
from skippipe.errors import ConfigError, did_you_mean
from skippipe.model.architecture_traits import traits_of
from skippipe.model.skeleton import build_one_layer

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")

LONGEST_CONTEXT = "max_position_embeddings"
"""The most positions that a model knows; `attribute_map` has the name of an architecture that calls it otherwise."""

TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
WITHOUT_EFFECT = (
    "torch_dtype",
    "cache_implementation",
    "use_mrope",
    "pretraining_tp",
    "max_window_layers",
    "auto_map",
    "task_specific_params",
    "interpolate_factor",
    "full_attn_mod",
)
"""Keys of published config.json that say nothing about a decoder in transformers, or that the run decides."""

UNRELATED = ("transformers_version", "_name_or_path", "architectures", "torch_dtype", "dtype")


def build_config(architecture: str, options: Mapping[str, object]) -> PretrainedConfig:
    """Return the configuration of `architecture` with `options`.

    The attention is what Hugging Face chooses: sdpa, and eager for gemma2, whose soft cap sdpa would leave out.
    Raises `ConfigError` for an architecture that cannot be split, an option that its configuration does not have
    (naming the nearest one) or a value that the configuration or the model refuses.
    """
    traits = traits_of(architecture, "model.architecture")
    config_class = CONFIG_MAPPING[architecture]
    defaults = config_class()
    known = {*defaults.to_dict(), *defaults.attribute_map, *traits.undeclared_options, *traits.older_options}
    if "hidden_activation" in options:
        known.add("hidden_act")  # published beside it; transformers reads the other
    if options.get("model_type", architecture) != architecture:
        raise ConfigError(
            f"model.options: they are of model_type {options['model_type']!r}, model.architecture is {architecture!r}"
        )
    for key in options:
        if key not in known and key not in WITHOUT_EFFECT:
            raise ConfigError(f"model.options: {architecture} has no option {key!r}{did_you_mean(key, known)}")
    _check_positive({key: options.get(key) for key in SIZES}, "model.options")
    given = {key: value for key, value in options.items() if key in known}
    for key in TOKEN_IDS:
        given.setdefault(key, None)
    for key in traits.dropout_options:
        if key in known:
            given.setdefault(key, 0.0)
    if "num_key_value_heads" in known and "num_attention_heads" in given:
        given.setdefault("num_key_value_heads", given["num_attention_heads"])
    try:
        config = config_class(**given)
    except Exception as reason:  # the configuration classes raise many kinds of error
        raise ConfigError(f"model.options: {architecture} refuses them ({' '.join(str(reason).split())})") from None
    return _checked(config, "model.options")


def config_from_directory(directory: Path) -> PretrainedConfig:
    """Read config.json of a local Hugging Face directory; nothing is downloaded and no code of it is run.

    Dropout is off, whatever the file says: published ones hold that of their own training.
    """
    if not (directory / "config.json").is_file():
        raise ConfigError(f"model.directory: {directory} has no config.json")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as reason:
        raise ConfigError(f"model.directory: {directory}/config.json: {' '.join(str(reason).split())}") from None
    for key in traits_of(config.model_type, f"model.directory: {directory}").dropout_options:
        if hasattr(config, key):
            setattr(config, key, 0.0)
    return _checked(config, f"model.directory: {directory}/config.json")


def num_layers(config: PretrainedConfig) -> int:
    """Return the number of decoder layers, which the stages share out among them."""
    return int(config.num_hidden_layers)


def num_experts(config: PretrainedConfig) -> int:
    """Return the number of experts in a layer, 0 where it is no mixture."""
    option = traits_of(config.model_type).num_experts
    return int(getattr(config, option) or 0) if option is not None else 0


def check_length(config: PretrainedConfig, length: int, where: str) -> None:
    """Raise `ConfigError`, beginning with `where`, where learned positions do not reach for samples of `length` tokens.

    Positions that are rotations have no end; a model may be trained on longer texts than it knows.
    """
    positions = getattr(config, LONGEST_CONTEXT)
    if traits_of(config.model_type).position_embedding is not None and length > positions:
        raise ConfigError(
            f"{where} is {length}, the model has {positions} positions ({config.model_type} learns a vector for each); "
            f"set it to at most {positions}"
        )


def rope_borders(config: PretrainedConfig) -> list[int]:
    """Return after how many positions longrope takes its other factors, once or for each type of layers that has it."""
    longropes = (rope for rope in _rope_parameters(config) if rope.get("rope_type") == "longrope")
    return [int(rope["original_max_position_embeddings"]) for rope in longropes]


def _rope_parameters(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Return how queries and keys are rotated: once, or for each type of layers."""
    given = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in given.values() if isinstance(value, dict)]
    return nested or [given]


def attention_in_use(config: PretrainedConfig) -> str:
    """Return which attention a model runs, in words; `config` is that of the built model, where it is chosen."""
    name: str = config._attn_implementation or "eager"
    reason = traits_of(config.model_type).eager_because
    return f"eager ({reason})" if name == "eager" and reason else name


def config_to_json(config: PretrainedConfig) -> str:
    """Return the configuration as JSON with sorted keys, without what does not change the computation."""
    content = {key: value for key, value in config.to_dict().items() if key not in UNRELATED}
    return json.dumps(content, sort_keys=True, default=str)


def fingerprint(config: PretrainedConfig) -> str:
    """Return 16 hexadecimal digits that identify the model's shape and computation, not its weights."""
    return hashlib.sha256(config_to_json(config).encode()).hexdigest()[:16]


def turn_off_cache_and_router_logits(config: PretrainedConfig) -> None:
    """Turn off, in place, what a model cut into stages does not have.

    The head sees no layers, hence no routers of a mixture of experts: there is no auxiliary loss.
    """
    config.use_cache = False
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False


def _checked(config: PretrainedConfig, where: str) -> PretrainedConfig:
    """Return `config` ready for stages: no cache, no router logits, and a first layer that can be built."""
    _check_sizes(config, where)
    _check_rotation(config, where)
    turn_off_cache_and_router_logits(config)
    try:
        build_one_layer(config)
    except Exception as reason:  # modules raise any kind of error on a value they cannot take
        problem = " ".join(f"{type(reason).__name__}: {reason}".split())
        raise ConfigError(f"{where}: {config.model_type} cannot be built from them ({problem})") from None
    return config


def _check_sizes(config: PretrainedConfig, where: str) -> None:
    _check_positive({key: getattr(config, key, None) for key in SIZES}, where)
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if config.hidden_size % heads and getattr(config, "head_dim", None) is None:
        raise ConfigError(f"{where}: hidden_size {config.hidden_size} does not divide by num_attention_heads {heads}")
    if groups and heads % groups:
        raise ConfigError(f"{where}: num_attention_heads {heads} does not divide by num_key_value_heads {groups}")
    experts = num_experts(config)
    if experts and config.num_experts_per_tok > experts:
        raise ConfigError(f"{where}: num_experts_per_tok is {config.num_experts_per_tok}, there are {experts} experts")


def _check_rotation(config: PretrainedConfig, where: str) -> None:
    if any("dynamic" in str(rope.get("rope_type")) for rope in _rope_parameters(config)):
        raise ConfigError(
            f"{where}: rope_type 'dynamic' turns keys by the longest text that was seen before, which stages on "
            "several machines do not share; take 'linear', 'yarn', 'llama3' or 'default' (up to "
            "max_position_embeddings, dynamic is the same as default)"
        )


def _check_positive(sizes: Mapping[str, object], where: str) -> None:
    for key, size in sizes.items():
        if isinstance(size, int) and size < 1:
            raise ConfigError(f"{where}: {key} is {size}, at least 1 is needed")


def experiment_model(experiment: Experiment) -> PretrainedConfig:
    """Return the Hugging Face configuration of the experiment's model, its vocabulary that of the tokenizer."""
    if experiment.model.directory is not None:
        config = config_from_directory(Path(experiment.model.directory))
    else:
        config = build_config(experiment.model.architecture, _own_options(experiment))
    check_length(config, experiment.training.sequence_length, "training.sequence_length")
    return config


def _own_options(experiment: Experiment) -> dict[str, object]:
    architecture, options = experiment.model.architecture, dict(experiment.model.options)
    traits_of(architecture, "model.architecture")
    if "vocab_size" not in options:  # only then is a tokenizer needed, which may lie on the hub
        options["vocab_size"] = vocabulary_size(experiment.data)
    own_name = CONFIG_MAPPING[architecture].attribute_map.get(LONGEST_CONTEXT, LONGEST_CONTEXT)
    if not {LONGEST_CONTEXT, own_name} & options.keys():
        options[LONGEST_CONTEXT] = max(2048, experiment.training.sequence_length)
    return options
