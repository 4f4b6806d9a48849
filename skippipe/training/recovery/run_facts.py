"""What a process hears of a run before it asks to be taken in."""

from typing import Any

from pydantic import Field

from skippipe.membership.epoch import Member
from skippipe.training.startup import Hardware
from skippipe_scheduler.files import Count, StrictModel
from skippipe_scheduler.problem.cluster import Device


class TrainerFacts(StrictModel):
    """What the members' trainers have in common."""

    devices: str
    peak_tflop_per_s: float | None
    device_types: dict[str, Device]
    """What each node computes on."""
    fingerprint: str
    num_tokens: Count
    """Of the tokenised text."""
    wandb_id: str | None = None
    disk_nonce: str
    """Of the run's `RunDisks`."""

    def hardware(self, nodes: tuple[str, ...], own: str, device: Device) -> Hardware:
        """Return what the run computes on, with this process's own device at its node."""
        known = self.device_types | {own: device}
        return Hardware(self.devices, self.peak_tflop_per_s, tuple(known.get(node, device) for node in nodes))


class RunFacts(StrictModel):
    """A run under way, as one of its members tells it."""

    skippipe: str
    torch: str
    experiment: dict[str, Any]
    """That of the member that tells it."""
    cluster: str
    """The text of its cluster file."""
    plans: str
    """The set of plans for all nodes, as `PlanSet.to_json` writes it."""
    members: tuple[Member, ...] = Field(min_length=1)
    trainer: TrainerFacts
