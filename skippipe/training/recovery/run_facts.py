"""What a process hears of a run before it asks to be taken in."""

from pathlib import Path
from typing import Any, Self

from pydantic import Field

from skippipe.config.experiment import Experiment
from skippipe.data.token_cache_index import Split
from skippipe.errors import InputError
from skippipe.membership.epoch import Member
from skippipe.training.startup import Hardware, installed_versions
from skippipe_scheduler.files import Count, StrictModel, read_text
from skippipe_scheduler.problem.cluster import Device


class TrainerFacts(StrictModel):
    """What the members' trainers have in common."""

    devices: str
    peak_tflop_per_s: float | None
    device_types: dict[str, Device]
    """What each node computes on."""
    fingerprint: str
    num_tokens: dict[Split, Count]
    """Of the tokenised text."""
    own_texts: dict[str, str] = Field(default_factory=dict)
    """Fingerprint of the text of each node, where these have their own."""
    wandb_id: str | None = None
    disk_nonce: str
    """Of the run's `RunDisks`."""

    def hardware(self, nodes: tuple[str, ...], own: str, device: Device) -> Hardware:
        """Return what the run computes on, with this process's own device at its node."""
        known = self.device_types | {own: device}
        return Hardware(self.devices, self.peak_tflop_per_s, tuple(known.get(node, device) for node in nodes))


class ToldExperiment(StrictModel):
    """An experiment as one process tells it to others, which have none of its files."""

    skippipe: str
    torch: str
    experiment: dict[str, Any]
    cluster: str
    """The text of its cluster file."""
    config_json: str | None
    """The text of the model's config.json, where the experiment names a directory with one."""

    @classmethod
    def of(cls, experiment: Experiment) -> Self:
        """Return an experiment with its files; raise `InputError` where one of them cannot be read."""
        directory = experiment.model.directory
        return cls(
            **installed_versions(),
            experiment=experiment.model_dump(mode="json"),
            cluster=read_text(Path(experiment.cluster), InputError),
            config_json=None if directory is None else read_text(Path(directory) / "config.json", InputError),
        )


class RunFacts(ToldExperiment):
    """A run under way, as one of its members tells it."""

    plans: str
    """The set of plans for all nodes, as `PlanSet.to_json` writes it."""
    members: tuple[Member, ...] = Field(min_length=1)
    trainer: TrainerFacts
