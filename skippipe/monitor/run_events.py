"""RUN/events.jsonl: how a run's membership changed, one JSON object a change."""

import logging
import time
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field

from skippipe.errors import InputError
from skippipe_scheduler.files import Count, Seconds, StrictModel, json_lines, parse

logger = logging.getLogger(__name__)
FILE_NAME: Final = "events.jsonl"


class RestoredStage(StrictModel):
    """A stage that nobody held, and that goes on from another state."""

    stage: Count
    place: str
    """What the state was found in."""
    of_step: Count
    """After which step the state was that."""
    node: str | None = None
    """Who has left another stage for this one; None where one of its own nodes has come back."""

    def words(self, step: int) -> str:
        """Say it, where the others stand after `step`."""
        behind = f", {step - self.of_step} steps behind" if self.of_step < step else ""
        if self.node is None:
            return f"stage {self.stage} goes on from {self.place}{behind}"
        return f"{self.node} takes over stage {self.stage} from {self.place}{behind}"


Pace = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""By what factor something takes longer, beside what the plan assumed and all others of its kind."""


class LinkPace(StrictModel):
    """A link that has become slower or faster for good."""

    nodes: tuple[str, str]
    """Its ends."""
    pace: Pace
    """That of messages, both ways together."""


class PaceChange(StrictModel):
    """Nodes and links that have become slower or faster for good, and what another plan makes of that."""

    paces: dict[str, Pace]
    """That of the tasks of nodes."""
    links: tuple[LinkPace, ...] = ()
    time_ratio: Seconds
    """The iteration of the new plan over that of the old one, both at the measured paces."""

    @property
    def who(self) -> str:
        """Say who has changed how."""
        paces = [*self.paces.items(), *((f"the link {' - '.join(link.nodes)}", link.pace) for link in self.links)]
        return ", ".join(
            f"{what} is {max(pace, 1 / pace):.1f} times {'slower' if pace > 1 else 'faster'} than planned"
            for what, pace in paces
        )

    def __str__(self) -> str:
        """Say what became of it."""
        return f"{self.who}; new plan, {self.time_ratio:.2f} of the time of the old one"


class MembershipChange(StrictModel):
    """From one epoch to the next."""

    event: Literal["epoch"] = "epoch"
    time: str = Field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    """When the new epoch ran, in UTC."""
    epoch: Count
    """The new epoch, counted over all starts of the run; its plan is kept under this number."""
    epoch_of_start: Count | None = None
    """The same, counted from the start in which it began; None where that is not told."""
    lost: dict[str, str]
    """Nodes that are no longer in it, each with the reason why it counts as lost."""
    joined: tuple[str, ...]
    """Nodes that have come, or come back."""
    members: tuple[str, ...]
    """All nodes of the new epoch, in rank order."""
    num_nodes: Count | None = None
    """Nodes of the run's plan, present or not; None where that is not told."""
    absent_stages: tuple[int, ...]
    """Stages that nobody holds now."""
    restored: tuple[RestoredStage, ...]
    """Stages that are back."""
    pace_change: PaceChange | None = None
    """Why the plan is another one where members are the same."""
    reason: str
    """Why the old epoch ended."""
    step: Count
    """The last step that all have taken."""
    interrupted: bool
    """Whether a step was under way, which begins again."""
    durations_s: dict[str, Seconds]
    """What it cost: `agreement`, `planning`, `state` (of stages, for who comes) and `groups` (connections, proofs)."""
    total_s: Seconds
    """From the end of the old epoch until the new one ran."""

    def __str__(self) -> str:
        """Say it in one line."""
        if self.pace_change is not None:
            return f"{self.pace_change}, from step {self.step + 1}, {self.total_s:.1f} s"
        who = [f"{node} lost ({cause})" for node, cause in self.lost.items()]
        who += [f"{node} joined" for node in self.joined]
        who += [each.words(self.step) for each in self.restored]
        of_all = "" if self.num_nodes is None else f" of {self.num_nodes}"
        around = f", around stage {', '.join(map(str, self.absent_stages))}" if self.absent_stages else ""
        step = f"step {self.step + 1} {'again' if self.interrupted else 'next'}"
        planning_s = self.durations_s.get("planning", 0.0)
        return (
            f"{', '.join(who) or self.reason}; going on with {len(self.members)}{of_all} nodes{around}, "
            f"new plan {planning_s:.2f} s, {step}, {self.total_s:.1f} s"
        )

    def append_to(self, run_dir: Path) -> None:
        """Append it to the run's file; storage that fails is said and does not end the run."""
        path = run_dir / FILE_NAME
        try:
            with path.open("a", encoding="utf-8") as stream:
                stream.write(self.model_dump_json() + "\n")
        except OSError as reason:
            logger.warning("%s: cannot be written (%s)", path, reason.strerror or reason)


def read_changes(run_dir: Path) -> list[MembershipChange]:
    """Return the changes of a run's membership; raise `InputError` naming a line that is none."""
    path = run_dir / FILE_NAME
    if not path.exists():
        return []
    lines = enumerate(json_lines(path), start=1)
    return [parse(MembershipChange, line, f"{path}:{number}", InputError) for number, line in lines if line is not None]


def size_of_changes(run_dir: Path) -> int:
    """Return the bytes of a run's file of changes: where it is as before, so are they."""
    path = run_dir / FILE_NAME
    return path.stat().st_size if path.exists() else 0
