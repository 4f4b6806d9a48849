"""The run ends."""

from skippipe.errors import InfeasibleError
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.training.recovery.lost_stage.situation import Situation
from skippipe.training.recovery.state_source import FoundState, StateSource, WantedState


class Stop:
    """No way on; see `WayOn`."""

    def plans(self, stage: int, situation: Situation) -> PlanSet:
        """Refuse."""
        raise InfeasibleError("recovery.lost_stage says stop", stage=stage)

    def state(self, wanted: WantedState, source: StateSource) -> FoundState | None:
        """Return nothing."""
        return None
