"""What people see of a change of membership: one line, and one event in RUN/events.jsonl."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from skippipe.errors import SkipPipeError
from skippipe.monitor.run_events import RunEvents
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe_scheduler.files import Count, StrictModel

logger = logging.getLogger(__name__)


class RestoredStage(StrictModel):
    """A stage that goes on from an older state."""

    stage: Count
    place: str
    """What the state was found in."""
    of_step: Count
    """After which step the state was that."""


class MembershipChange(NamedTuple):
    """From one epoch to the next."""

    epoch: int
    before: Sequence[str]
    """Nodes of the old epoch."""
    now: Sequence[str]
    causes: Mapping[str, str]
    """Why those that are lost count as lost, as far as it is known here."""
    reason: str
    """Why the old epoch ended."""
    step: int
    """The last step that all have taken."""
    interrupted: bool
    """Whether a step was under way, which begins again."""
    absent_stages: Sequence[int]
    """Stages that nobody holds now."""
    restored: Sequence[RestoredStage]
    """Stages that nobody held before, and that go on from an older state."""
    durations_s: Mapping[str, float]
    """What it cost, by part: `planning`, `groups` and so on."""
    total_s: float
    """From the end of the old epoch until the new one ran."""

    @property
    def lost(self) -> list[str]:
        """Nodes that are no longer in it."""
        return [node for node in self.before if node not in self.now]

    @property
    def joined(self) -> list[str]:
        """Nodes that have come."""
        return [node for node in self.now if node not in self.before]

    def __str__(self) -> str:
        """Say it in one line."""
        who = [f"{node} lost ({self.causes.get(node, self.reason)})" for node in self.lost]
        who += [f"{node} joined" for node in self.joined]
        who += [
            f"stage {each.stage} goes on from {each.place}, {self.step - each.of_step} steps behind"
            for each in self.restored
        ]
        step = f"step {self.step + 1}{' again' if self.interrupted else ' next'}"
        stages = ", ".join(map(str, self.absent_stages))
        around = f", around stage {stages}" if stages else ""
        num_all = len({*self.before, *self.now})
        return (
            f"{', '.join(who) or self.reason}; going on with {len(self.now)} of {num_all} nodes{around}, "
            f"new plan {self.durations_s.get('planning', 0.0):.2f} s, {step}, {self.total_s:.1f} s"
        )


def record(change: MembershipChange, plans: PlanSet, run_dir: Path) -> None:
    """Say and write down a change, and keep the plan that began with it; a failure to write is logged."""
    logger.warning("%s", change)
    RunEvents(run_dir).write(
        event="epoch",
        epoch=change.epoch,
        lost=change.lost,
        joined=change.joined,
        members=list(change.now),
        absent_stages=list(change.absent_stages),
        restored=[each.model_dump() for each in change.restored],
        reason=change.reason,
        step=change.step,
        planning_s=change.durations_s.get("planning", 0.0),
        durations_s={part: round(duration_s, 4) for part, duration_s in change.durations_s.items()},
        recovery_s=change.total_s,
    )
    folder = run_dir / "epochs"
    try:
        folder.mkdir(exist_ok=True)
        plans.main.save(folder / f"epoch-{change.epoch:04d}.plan.json")
    except (OSError, SkipPipeError) as reason:
        logger.warning("the plan of epoch %d is not kept (%s)", change.epoch, reason)
