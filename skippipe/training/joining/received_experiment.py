"""The experiment of another host, brought to one that has none of its files."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from skippipe.config.experiment import Experiment
from skippipe.config.experiment_file import parse_overrides, validate_experiment
from skippipe.data.kept_tokenizer import kept_options, unpack_tokenizer
from skippipe.errors import InputError
from skippipe.training.recovery.run_facts import ToldExperiment
from skippipe_scheduler.files import read_text, write_atomically

logger = logging.getLogger(__name__)


def received_experiment(told: ToldExperiment, tokenizer: bytes, overrides: Sequence[str]) -> Experiment:
    """Return an experiment for this host, with what differs here; what it needs of files is written to its run_dir.

    Files that are not as told here (cluster file, config.json, tokenizer) come from what was told. An absolute run_dir
    that is not here becomes runs/NAME, and a folder of caches that cannot be here the user's own. Text stays where the
    experiment says, as it never travels.

    Args:
        told: What another host has told.
        tokenizer: The files of its tokenizer, as `packed_tokenizer` gives them.
        overrides: `key.sub=value` for what differs on this host.
    """
    given = parse_overrides(overrides)
    content = told.experiment | {"run_dir": _run_dir_here(told.experiment)}
    merged = OmegaConf.merge(OmegaConf.create(content), OmegaConf.create(given))
    experiment = validate_experiment(OmegaConf.to_container(merged, resolve=True), "the run's experiment", overrides)
    run_dir, update = experiment.run_path, dict[str, Any]()
    if "cluster" not in given:
        update["cluster"] = str(_as_told(Path(experiment.cluster), told.cluster, run_dir / "cluster.yaml"))
    directory = experiment.model.directory
    if directory is not None and told.config_json is not None and "directory" not in given.get("model", {}):
        config = _as_told(Path(directory) / "config.json", told.config_json, run_dir / "model" / "config.json")
        update["model"] = experiment.model.model_copy(update={"directory": str(config.parent)})
    data = experiment.data
    if data.cache_dir is not None and not Path(data.cache_dir).parent.is_dir():
        data = data.model_copy(update={"cache_dir": None})
    if "tokenizer" not in given.get("data", {}):
        unpack_tokenizer(tokenizer, run_dir, anew=True)
        data = kept_options(data, run_dir.absolute())
    return experiment.model_copy(update=update | {"data": data})


def _run_dir_here(content: dict[str, Any]) -> str | None:
    """Return where the run lies on this host: nothing that another one says leads out of the working folder.

    But an absolute path that is here already is storage that both see.
    """
    told = content.get("run_dir")
    if not isinstance(told, str):
        return None
    path = Path(told)
    inside = not path.is_absolute() and ".." not in path.parts
    if inside or (path.is_absolute() and path.is_dir()):
        return told
    logger.info("run_dir: %s is not here; the run's files are in runs/ of this folder", told)
    return None


def _as_told(path: Path, text: str, kept: Path) -> Path:
    """Return a file with this text: `path` where it is here, else `kept`, which is written."""
    try:
        if read_text(path, InputError) == text:
            return path
    except InputError:
        pass
    write_atomically(kept.absolute(), text)
    return kept.absolute()
