"""The model's configuration: a Hugging Face decoder chosen by name, its options checked."""

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from skippipe.config.experiment import Experiment
from skippipe.data.tokenizer import vocabulary_size
from skippipe.errors import ConfigError
from skippipe.model.skeleton import build_one_layer

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
"""Architectures whose split into stages is tested to be exact."""

SHARING = ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "zamba", "zamba2")
"""Layers of these use keys, values or weights of other layers, so a stage cannot run alone."""

READ_HEAD_DIM = ("qwen2", "phi3", "olmo2", "granite", "qwen3_moe")
"""The models of these read `head_dim`, which their configuration classes do not declare."""

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")

POSITION_KEYS = {"max_position_embeddings", "n_positions"}
"""What architectures call the longest context that the model knows."""

DROPOUTS = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")
"""Off unless asked for: dropout would make the same run differ between one process and several."""

TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
UNRELATED = ("transformers_version", "_name_or_path", "architectures", "torch_dtype", "dtype")


def build_config(architecture: str, options: Mapping[str, object]) -> PretrainedConfig:
    """Return the configuration of `architecture` with `options`.

    The attention is what Hugging Face chooses: sdpa, and eager for gemma2, whose soft cap sdpa would leave out.
    Raises `ConfigError` for an architecture that cannot be split, an option that its configuration does not have
    (naming the nearest one) or a value that the configuration or the model refuses.
    """
    check_architecture(architecture, "model.architecture")
    config_class = CONFIG_MAPPING[architecture]
    defaults = config_class()
    known = {*defaults.to_dict(), *defaults.attribute_map, *(("head_dim",) if architecture in READ_HEAD_DIM else ())}
    for key in options:
        if key not in known:
            raise ConfigError(f"model.options: {architecture} has no option {key!r}{_nearest(key, known)}")
    _check_positive({key: options.get(key) for key in SIZES}, "model.options")
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
    return _checked(config, "model.options")


def config_from_directory(directory: Path) -> PretrainedConfig:
    """Read config.json of a local Hugging Face directory; nothing is downloaded and no code of it is run."""
    if not (directory / "config.json").is_file():
        raise ConfigError(f"model.directory: {directory} has no config.json")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as reason:
        raise ConfigError(f"model.directory: {directory}/config.json: {' '.join(str(reason).split())}") from None
    check_architecture(config.model_type, f"model.directory: {directory}")
    return _checked(config, f"model.directory: {directory}/config.json")


def num_layers(config: PretrainedConfig) -> int:
    """Return the number of decoder layers, which the stages share out among them."""
    return int(config.num_hidden_layers)


def attention_in_use(config: PretrainedConfig) -> str:
    """Return which attention a model runs, in words; `config` is that of the built model, where it is chosen."""
    name = config._attn_implementation or "eager"
    return "eager (sdpa would leave out the soft cap)" if name == "eager" and config.model_type == "gemma2" else name


def config_to_json(config: PretrainedConfig) -> str:
    """Return the configuration as JSON with sorted keys, without what does not change the computation."""
    content = {key: value for key, value in config.to_dict().items() if key not in UNRELATED}
    return json.dumps(content, sort_keys=True, default=str)


def fingerprint(config: PretrainedConfig) -> str:
    """Return 16 hexadecimal digits that identify the model's shape and computation, not its weights."""
    return hashlib.sha256(config_to_json(config).encode()).hexdigest()[:16]


def check_architecture(architecture: str, where: str) -> None:
    """Raise `ConfigError`, beginning with `where`, for an architecture that cannot be split into stages."""
    if architecture in ARCHITECTURES:
        return
    if architecture in SHARING:
        reason = "cannot be split into stages because its layers share state with each other"
    else:
        reason = f"cannot be split into stages{_nearest(architecture, ARCHITECTURES)}"
    raise ConfigError(f"{where}: {architecture!r} {reason}; supported: {', '.join(ARCHITECTURES)}")


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _checked(config: PretrainedConfig, where: str) -> PretrainedConfig:
    """Return `config` ready for stages: no cache, no router logits, and a first layer that can be built."""
    _check_sizes(config, where)
    config.use_cache = False
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False  # the head sees no layers, hence no router: no auxiliary loss
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
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts and config.num_experts_per_tok > experts:
        raise ConfigError(f"{where}: num_experts_per_tok is {config.num_experts_per_tok}, there are {experts} experts")


def _check_positive(sizes: Mapping[str, object], where: str) -> None:
    for key, size in sizes.items():
        if isinstance(size, int) and size < 1:
            raise ConfigError(f"{where}: {key} is {size}, at least 1 is needed")


def experiment_model(experiment: Experiment) -> PretrainedConfig:
    """Return the Hugging Face configuration of the experiment's model, its vocabulary that of the tokenizer."""
    if experiment.model.directory is not None:
        return config_from_directory(Path(experiment.model.directory))
    options = dict(experiment.model.options)
    options.setdefault("vocab_size", vocabulary_size(experiment.data))
    if not POSITION_KEYS & options.keys():
        options["max_position_embeddings"] = max(2048, experiment.training.sequence_length)
    return build_config(experiment.model.architecture, options)
