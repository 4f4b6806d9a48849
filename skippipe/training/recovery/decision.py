"""What the members of a run agree on beside who is left: the plans, the step, and where they meet."""

from typing import Annotated, Any

from pydantic import Field

from skippipe.monitor.run_events import PaceChange
from skippipe.training.recovery.progress import Settlement
from skippipe_scheduler.files import Count, Seconds, StrictModel


class Decision(StrictModel):
    """What one member has worked out for all."""

    plans: str = ""
    """The set of plans for the nodes that are left, as `PlanSet.to_json` writes it."""
    whole: str = ""
    """That for all nodes, at the places that they have from now on."""
    step: Count = 0
    totals: tuple[Annotated[float, Field(allow_inf_nan=True)], ...] | None = None
    work_is_left: bool = False
    standing: tuple[str, ...] = ()
    """These four as in `Settlement`."""
    host: str = ""
    port: Annotated[int, Field(ge=0, lt=1 << 16)] = 0
    """Where the store of the epoch is."""
    pace_change: PaceChange | None = None
    """Why the plans are others though the members are the same."""
    planning_s: Seconds = 0.0
    """How long the plans took."""
    error: dict[str, Any] | None = None
    """Why the run cannot go on (`runtime.ranks.remote_errors`); None where it can."""

    @property
    def settlement(self) -> Settlement:
        """Where all go on."""
        return Settlement(self.step, self.totals, self.work_is_left, self.standing)
