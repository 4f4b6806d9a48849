"""Another node takes over the stage from its part of the last checkpoint."""

from skippipe.errors import InfeasibleError
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.training.recovery.lost_stage.situation import Situation
from skippipe.training.recovery.lost_stage.take_over import take_over
from skippipe.training.recovery.state_source import FoundState, StateSource, WantedState


class FromCheckpoint:
    """The other stages stay where they are in training; see `WayOn`."""

    def plans(self, stage: int, situation: Situation) -> PlanSet:
        """Return the plans with another node at the stage."""
        if stage not in situation.saved_stages:
            raise InfeasibleError("there is no checkpoint yet with its part on the disks that are left", stage=stage)
        return take_over(stage, situation)

    def state(self, wanted: WantedState, source: StateSource) -> FoundState | None:
        """Return the stage's part of the last checkpoint."""
        found = source.saved(wanted)
        return None if found is None else FoundState(found, "a checkpoint")
