"""What came of a run, and what all runs of a kind together show."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]
"""Titles of columns and their cells."""
EXACT = 1e-5
"""Losses that differ by less are the same, in fp32."""


@dataclass
class Loss:
    """One process that was killed, stopped or cut off, and how the others went on."""

    node: str
    rank: int
    recovery_s: float | None = None
    """As the run itself says: from the moment at which it was noticed until the new epoch began."""
    next_step_s: float | None = None
    """From the kill, stop or cut until the next step was finished."""
    back_s: float | None = None
    """From its start again until it is in the run."""
    taking_in_s: float | None = None
    """For how long the others waited for it."""
    ended_s: float | None = None
    """From the cut until it had ended by itself."""
    woken_s: float = 0.0
    """When it was woken again, by `time.monotonic`."""


@dataclass
class Outcome:
    """What came of one run."""

    kind: str
    number: int
    losses: list[Loss] = field(default_factory=list)
    exit_codes: list[int | None] = field(default_factory=list)
    expected_codes: list[int | None] = field(default_factory=list)
    missing_steps: int = 0
    loss_difference: float | None = None
    leftover: int = 0
    late_writes: list[str] = field(default_factory=list)
    """What those who were left out have changed in the run's directory after the others had gone on."""
    error: str = ""
    last_words: list[str] = field(default_factory=list)

    @property
    def went_on(self) -> bool:
        """Whether all others finished the run, exactly, and each lost one ended without having done harm."""
        whole = not (self.missing_steps or self.leftover or self.error or self.late_writes)
        exact = self.loss_difference is not None and self.loss_difference < EXACT
        return exact and whole and self.exit_codes == self.expected_codes


def summary(outcomes: Sequence[Outcome]) -> Row:
    """Return the row of a kind; columns that say nothing of it are left out."""
    losses = [loss for outcome in outcomes for loss in outcome.losses]
    next_s = [loss.next_step_s for loss in losses]
    differences = [outcome.loss_difference for outcome in outcomes if outcome.loss_difference is not None]
    row = {
        "runs": len(outcomes),
        "went on to the end, exactly": sum(outcome.went_on for outcome in outcomes),
        "losses": len(losses),
        "of rank 0, with the store": sum(loss.rank == 0 for loss in losses),
        "next finished step, median s": median(next_s),
        "longest s": max((round(duration_s, 2) for duration_s in next_s if duration_s is not None), default=None),
        "recovery as the run says, median s": median(loss.recovery_s for loss in losses),
        "in again after its start, median s": median(loss.back_s for loss in losses),
        "the others waited for it, median s": median(loss.taking_in_s for loss in losses),
        "ended by itself after, median s": median(loss.ended_s for loss in losses),
        "writes of those left out": sum(len(outcome.late_writes) for outcome in outcomes),
        "largest difference of a loss": max(differences, default=None),
        "failed": [f"{outcome}" for outcome in outcomes if not outcome.went_on],
    }
    return {title: cell for title, cell in row.items() if cell is not None}


def median(durations_s: Iterable[float | None]) -> float | None:
    """Return the median of those that are known; None where none is."""
    known = [duration_s for duration_s in durations_s if duration_s is not None]
    return round(statistics.median(known), 2) if known else None
