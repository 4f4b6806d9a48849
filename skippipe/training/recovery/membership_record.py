"""What people see of a change of membership: one line, and one event in RUN/events.jsonl."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from skippipe.errors import SkipPipeError
from skippipe.monitor.run_events import RunEvents
from skippipe.runtime.plans.plan_set import PlanSet

logger = logging.getLogger(__name__)


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
        step = f"step {self.step + 1}{' again' if self.interrupted else ' next'}"
        num_all = len({*self.before, *self.now})
        return (
            f"{', '.join(who) or self.reason}; going on with {len(self.now)} of {num_all} nodes, "
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
