"""How far each process of a run has come when one is lost, and what follows: a step is taken by all or by none.

Weights change behind the one sum of all ranks at the end of a step. Who has its result was given the part of every
rank, so every rank had reduced its gradients by then. Where one that is left has the result, all others that are left
take the step with it; where none has, the step begins again on all.
"""

from collections.abc import Mapping
from typing import Annotated, NamedTuple

from pydantic import Field

from skippipe.checkpoint.disks.newest_part import SavedFiles
from skippipe.errors import CommunicationError
from skippipe_scheduler.files import Count, StrictModel


class ProgressReport(StrictModel):
    """Where one process stands."""

    step: Count
    """The last step that its weights have taken."""
    contributed: Count
    """The last step to whose sum it has given its part."""
    totals: tuple[Annotated[float, Field(allow_inf_nan=True)], ...] | None = None
    """The sum of its last step; None before the first one of this start."""
    work_is_left: bool = False
    """Whether its last step is not yet validated, reported and saved."""


class KeptStep(StrictModel):
    """A copy of a stage that a process keeps for another one."""

    stage: Count
    step: Count


class MemberReport(StrictModel):
    """What one process says before a new epoch."""

    stage: Count
    progress: ProgressReport | None
    """None where it has nothing yet of its stage."""
    copies: tuple[KeptStep, ...] = ()
    saved: SavedFiles | None = None
    """What its disk has of the newest checkpoint."""
    has_text: bool = True
    """Whether its host has the text, which it needs where it begins microbatches."""


class Settlement(NamedTuple):
    """Where all go on."""

    step: int
    """The last step that all have taken, once those behind have taken it with `totals`."""
    totals: tuple[float, ...] | None
    work_is_left: bool
    """Whether that step is to be validated, reported and saved, by all."""
    standing: tuple[str, ...] = ()
    """Who stands there with the state of its stage; all others have come lately."""


def settle(reports: Mapping[str, ProgressReport]) -> Settlement:
    """Return where the processes that are left go on.

    Raises `CommunicationError` where one is behind and cannot follow, which no order of events leads to.
    """
    if not reports:
        raise CommunicationError("all who are left have come lately; start again from the last checkpoint")
    step = max(report.step for report in reports.values())
    known = (report.totals for report in reports.values() if report.step == step)
    totals = next((totals for totals in known if totals is not None), None)  # one that came lately has none
    behind = {name: report for name, report in reports.items() if report.step < step}
    for name, report in behind.items():
        if totals is None or report.step < step - 1 or report.contributed < step:
            raise CommunicationError(
                f"{name} is at step {report.step} and has given its part to step {report.contributed}, others have "
                f"taken step {step}; start again from the last checkpoint"
            )
    left = any(report.work_is_left for report in reports.values()) or bool(behind)
    return Settlement(step, totals, left, tuple(reports))
