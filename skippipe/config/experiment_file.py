"""Reading an experiment: safe YAML, `base:` files, overrides, and messages that name the nearest right key."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from skippipe.config.experiment import Experiment
from skippipe.config.key_names import suggestion
from skippipe.config.places import anchor, relative_inside
from skippipe.config.written_values import as_meant
from skippipe.errors import ConfigError, InputError, StorageError
from skippipe_scheduler.errors import refuse_text
from skippipe_scheduler.files import check_text, describe, read_text, write_atomically
from skippipe_scheduler.yaml_file import parse_yaml_text, read_yaml

KEY = re.compile(r"[\w-]+(\.[\w-]+)*")
"""How an override names a key."""
FIRST_LINE: Final = "# A whole experiment, as skippipe wrote it; it ends with three dots."
LAST_LINE: Final = "..."
"""How YAML ends a document."""


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read and validate the experiment of a YAML file.

    Args:
        path: The file; what it leaves out comes from its `base:` files, then from the defaults. A relative path in a
            file starts at that file, but run_dir at the working directory; `~` and `$NAME` are replaced. In the
            config.yaml of a run, run_dir is where that lies, wherever the run began.
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
    refuse_text(overrides, "overrides")
    path = Path(path)
    given = parse_overrides(overrides)
    try:
        merged = OmegaConf.merge(_read(path, seen=()), _where_it_lies(path), OmegaConf.create(given))
        resolved = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, RecursionError) as reason:
        key = getattr(reason, "full_key", None)
        raise ConfigError(f"{path}: {f'{key}: ' if key else ''}{_first_line(reason)}") from None
    return validate_experiment(resolved, str(path), overrides)


def load_run(run_dir: str | Path) -> Experiment:
    """Read the experiment of a run.

    Args:
        run_dir: The run's directory, in which training keeps the experiment as config.yaml.

    Returns:
        The complete experiment as the run was started with; its `run_dir` is where the run is now.

    Raises:
        InputError: The directory is none of a run.
        ConfigError: Its config.yaml is damaged.

    Examples:
        >>> load_run(Path("runs/tiny")).training.max_steps
        2
    """
    run_dir = Path(run_dir)
    path = run_dir / "config.yaml"
    if not path.exists():
        raise InputError(f"{run_dir}: not a run directory (no config.yaml)")
    return load_experiment(path)


def validate_experiment(content: Any, place: str, overrides: Sequence[str] = ()) -> Experiment:
    """Validate a mapping as an experiment.

    The message of a `ConfigError` begins with the override that is wrong, or else with `place`.
    """
    try:
        return Experiment.model_validate_json(json.dumps(as_meant(content, Experiment)), strict=True)
    except (TypeError, ValueError) as reason:
        if not isinstance(reason, ValidationError):  # a key of another kind than YAML's own
            raise ConfigError(f"{place}: only text, numbers, lists and keys can be read ({reason})") from None
        unknown = [error for error in reason.errors() if error["type"] == "extra_forbidden"]
        location = (unknown or reason.errors())[0]["loc"]
        place = next((f"override {one!r}" for one in overrides if _is_about(one, location)), place)
        if unknown:
            key = ".".join(str(part) for part in location)
            raise ConfigError(f"{place}: unknown key {key!r}{suggestion(key, Experiment)}") from None
        raise ConfigError(f"{place}: {describe(reason)}") from None


def save_experiment(experiment: Experiment, path: Path) -> None:
    """Write the complete experiment, defaults included, so that it can be read again, also in another place.

    What lies beside the file is named from there, everything else from the root.
    """
    try:
        write_atomically(path, f"{FIRST_LINE}\n{to_yaml(experiment, path.parent)}{LAST_LINE}\n")
    except OSError as reason:
        raise StorageError(f"{path}: {reason}") from None


def to_yaml(experiment: Experiment, folder: Path | None = None) -> str:
    """Return the complete experiment as YAML, for a file in `folder`: paths into it start there."""
    content = experiment.model_dump(mode="json")
    if folder is not None:
        relative_inside(content, folder)
    return OmegaConf.to_yaml(OmegaConf.create(content))


def _read(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: base files form a circle ({' -> '.join(p.name for p in seen)} -> {path.name})")
    _check_whole(path)
    given = read_yaml(path, ConfigError)
    anchor(given, path.parent, str(path))
    base = given.pop("base", None)
    content = OmegaConf.create(given)
    if base is None:
        return content
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: expected the name of a file, found {base!r}")
    below = _read(path.parent / base, (*seen, path.resolve()))
    merged = OmegaConf.merge(below, content)
    if not isinstance(merged, DictConfig):
        raise ConfigError(f"{path}: cannot be merged with its base {base}")
    return merged


def _where_it_lies(path: Path) -> dict[str, str]:
    """Return the run directory of a file that a run keeps of its experiment: it may have been moved, or named from
    another working directory; nothing for other files.
    """
    is_of_run = path.name == "config.yaml" and read_text(path, ConfigError).startswith(FIRST_LINE)
    return {"run_dir": str(path.parent)} if is_of_run else {}


def _check_whole(path: Path) -> None:
    """Raise `ConfigError` where a file that `save_experiment` wrote was cut: defaults would stand in for the rest."""
    lines = read_text(path, ConfigError).splitlines()
    if lines[:1] == [FIRST_LINE] and lines[-1] != LAST_LINE:
        raise ConfigError(
            f"{path}: cut short: its last line, {LAST_LINE!r}, is missing; bring it back from a copy, or start from "
            "the file that the run was started with"
        )


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Return `key.sub=value` texts as nested mappings, a later one over an earlier one; values are YAML.

    Raises `ConfigError` quoting the override that is wrong.
    """
    given: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not KEY.fullmatch(key):
            raise ConfigError(f"override {override!r}: expected key.sub=value")
        try:
            check_text(text)
        except ValueError as reason:
            raise ConfigError(f"override {override!r}: {reason}") from None
        *sections, last = key.split(".")
        below = given
        for section in sections:
            inner = below.get(section)
            below[section] = inner = inner if isinstance(inner, dict) else {}
            below = inner
        below[last] = parse_yaml_text(text, f"override {override!r}", ConfigError)
    anchor(given, Path(), "override")
    return given


def _is_about(override: str, location: Sequence[int | str]) -> bool:
    """Whether an override gave the value at `location`, or a part of it."""
    key = override.partition("=")[0].split(".")
    return [str(part) for part in location[: len(key)]] == key[: len(location)] and len(location) > 0


def _first_line(reason: Exception) -> str:
    return (str(reason).splitlines() or ["nested too deeply"])[0]
