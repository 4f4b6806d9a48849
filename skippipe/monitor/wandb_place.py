"""Where Weights & Biases records a run: by the experiment, and by wandb's own environment variables."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, NamedTuple

from skippipe.config.experiment import WandbOptions
from skippipe.errors import ConfigError

WandbMode = Literal["online", "offline", "disabled"]
MODES: Final[Mapping[str, WandbMode]] = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
"""What WANDB_MODE may say, its older words included."""


class WandbPlace(NamedTuple):
    """How and where a run is recorded."""

    mode: WandbMode
    project: str
    directory: Path
    """What the folder wandb/ lies in."""
    variables: tuple[str, ...]
    """The environment variables that had a say."""

    @classmethod
    def of(cls, options: WandbOptions, run_dir: Path, environment: Mapping[str, str] | None = None) -> "WandbPlace":
        """Return what holds: the environment, but an experiment's `disabled` and its own project stay.

        Raises `ConfigError` where WANDB_MODE is unknown.
        """
        values = os.environ if environment is None else environment
        mode: WandbMode = options.mode
        project, directory = options.project, run_dir
        variables = []
        said = values.get("WANDB_MODE")
        if said and mode != "disabled":
            if said not in MODES:
                raise ConfigError(f"WANDB_MODE must be online, offline or disabled, not {said!r}")
            mode = MODES[said]
            variables.append("WANDB_MODE")
        if mode == "disabled":
            return cls(mode, project, directory, tuple(variables))
        if values.get("WANDB_PROJECT") and project == WandbOptions().project:
            project = values["WANDB_PROJECT"]
            variables.append("WANDB_PROJECT")
        if values.get("WANDB_DIR"):
            directory = Path(values["WANDB_DIR"]).expanduser()
            variables.append("WANDB_DIR")
        return cls(mode, project, directory, tuple(variables))

    def __str__(self) -> str:
        """Say it in the start table."""
        place = "" if self.mode == "disabled" else f", project {self.project}, files in {self.directory / 'wandb'}"
        by = f" (by {', '.join(self.variables)} of the environment)" if self.variables else ""
        return f"Weights & Biases {self.mode}{place}{by}"
