"""Reading an experiment: safe YAML, `base:` files, overrides, and messages that name the nearest right key."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from skippipe.config.experiment import Experiment
from skippipe.config.key_names import suggestion
from skippipe.errors import ConfigError, InputError, StorageError
from skippipe_scheduler.files import describe, write_atomically

PATH_KEYS = ("cluster", "model.directory")


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read and validate the experiment of a YAML file.

    Args:
        path: The file; what it leaves out comes from its `base:` files, then from the defaults. A relative path in a
            file starts at that file.
        overrides: `key.sub=value` each; they win over the files. A relative path in them starts at the working
            directory.

    Returns:
        The complete experiment.

    Raises:
        ConfigError: A file cannot be read, or a key or value is wrong; the message names the file, the key and the
            nearest right one.

    Examples:
        >>> overrides = ["training.max_steps=2", "pipeline.planner.max_evaluations=200"]
        >>> experiment = load_experiment(Path("configs/experiments/tiny.yaml"), overrides)
        >>> experiment.pipeline.num_stages
        3
    """
    try:
        merged = OmegaConf.merge(_read(path, seen=()), _parse_overrides(overrides))
        resolved = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as reason:
        raise ConfigError(f"{path}: {str(reason).splitlines()[0]}") from None
    return validate_experiment(resolved, str(path))


def load_run(run_dir: Path) -> Experiment:
    """Read the experiment of a run.

    Args:
        run_dir: The run's directory, in which training keeps the experiment as config.yaml.

    Returns:
        The complete experiment as the run was started with.

    Raises:
        InputError: The directory is none of a run.
        ConfigError: Its config.yaml is damaged.

    Examples:
        >>> load_run(Path("runs/tiny")).training.max_steps
        2
    """
    path = run_dir / "config.yaml"
    if not path.exists():
        raise InputError(f"{run_dir}: not a run directory (no config.yaml)")
    return load_experiment(path)


def validate_experiment(content: Any, place: str) -> Experiment:
    """Validate a mapping as an experiment; `place` begins the message of a `ConfigError`."""
    try:
        return Experiment.model_validate(content)
    except ValidationError as reason:
        unknown = [error for error in reason.errors() if error["type"] == "extra_forbidden"]
        if unknown:
            key = ".".join(str(part) for part in unknown[0]["loc"])
            raise ConfigError(f"{place}: unknown key {key!r}{suggestion(key, Experiment)}") from None
        raise ConfigError(f"{place}: {describe(reason)}") from None


def save_experiment(experiment: Experiment, path: Path) -> None:
    """Write the complete experiment, defaults included, so that it can be read again."""
    try:
        write_atomically(path, to_yaml(experiment))
    except OSError as reason:
        raise StorageError(f"{path}: {reason}") from None


def to_yaml(experiment: Experiment) -> str:
    """Return the complete experiment as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(experiment.model_dump(mode="json")))


def _read(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: base files form a circle ({' -> '.join(p.name for p in seen)} -> {path.name})")
    try:
        content = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as reason:
        raise ConfigError(f"{path}: cannot be read ({reason})") from None
    except (YAMLError, OmegaConfBaseException) as reason:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(reason).split())})") from None
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path}: expected keys and values, found a list or a bare value")
    _anchor_paths(content, path.parent)
    base = content.pop("base", None)
    if base is None:
        return content
    below = _read(path.parent / str(base), (*seen, path.resolve()))
    merged = OmegaConf.merge(below, content)
    if not isinstance(merged, DictConfig):
        raise ConfigError(f"{path}: cannot be merged with its base {base}")
    return merged


def _anchor_paths(content: DictConfig, folder: Path) -> None:
    for key in PATH_KEYS:
        value = OmegaConf.select(content, key)
        if isinstance(value, str) and not Path(value).is_absolute():
            OmegaConf.update(content, key, str((folder / value).resolve()))


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r}: expected key.sub=value")
    try:
        parsed = OmegaConf.from_dotlist(list(overrides))
    except (YAMLError, OmegaConfBaseException) as reason:
        raise ConfigError(f"override: {' '.join(str(reason).split())} in {' '.join(overrides)!r}") from None
    _anchor_paths(parsed, Path())
    return parsed
