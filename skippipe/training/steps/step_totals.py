"""A step from its beginning to its end, as values: when it began, what all ranks agreed on, what it has come to."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

from skippipe.monitor.live.node_board import NodeReading
from skippipe.monitor.metrics import StepMetrics


class StepBegin(NamedTuple):
    """A step that is under way."""

    plan: str
    lr: float
    start_s: float


class StepTotals(NamedTuple):
    """What all ranks agree on in one sum at STEP."""

    loss: float
    exit_loss: float
    grad_norm: float
    stop: bool
    """Whether any rank was asked to stop."""
    stopped_by: int | None
    """The only rank that was asked to stop; None where none was, or several."""
    wants_epoch: bool
    """Whether any rank wants another epoch to begin: somebody waits to be taken in, or there is a better plan."""
    readings: Sequence[NodeReading]
    """What every rank has measured of itself."""

    @classmethod
    def of_sums(cls, sums: Sequence[float]) -> Self:
        """Take what the ranks have added up, in the order of `StepUpdate.take`."""
        squares, loss, exit_loss, stops, askers, wishes, *of_ranks = sums
        size = len(NodeReading._fields)
        readings = [NodeReading(*of_ranks[first : first + size]) for first in range(0, len(of_ranks), size)]
        only = int(askers) if stops == 1 else None
        return cls(loss, exit_loss, math.sqrt(squares), stops > 0, only, wishes > 0, readings)

    def finished(self, metrics: StepMetrics, nodes: Mapping[str, NodeReading]) -> "FinishedStep":
        """Return the step that has come to this, once all have taken it, with the readings by their nodes."""
        return FinishedStep(metrics, self.stop, self.stopped_by, self.wants_epoch, nodes)

    @property
    def finite(self) -> bool:
        """Whether the step may be taken."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class FinishedStep(NamedTuple):
    """A step whose update is applied, and that is still to be validated, reported and saved."""

    metrics: StepMetrics
    stop: bool
    """Whether any rank was asked to stop."""
    stopped_by: int | None
    """As in `StepTotals`."""
    wants_epoch: bool
    """As in `StepTotals`."""
    nodes: Mapping[str, NodeReading]
    """What the nodes have measured of themselves, in rank order."""
