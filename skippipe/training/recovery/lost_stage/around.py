"""All routes leave the stage out until one of its nodes is back."""

from skippipe.errors import InfeasibleError
from skippipe.planning.surviving_plans import plans_without
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.training.recovery.lost_stage.situation import Situation
from skippipe.training.recovery.state_source import FoundState, StateSource, WantedState


class RoutesAround:
    """Nodes stay at their places; see `WayOn`."""

    def plans(self, stage: int, situation: Situation) -> PlanSet:
        """Return the plans as they are, where there are routes without the stage."""
        if stage == 0:
            raise InfeasibleError("no route leaves out stage 0, which holds embedding and head", stage=stage)
        plans_without(situation.plans, situation.lost, time_limit_s=0.0, lost_stage="routes_around")
        return situation.plans

    def state(self, wanted: WantedState, source: StateSource) -> FoundState | None:
        """Return nothing: the stage waits for a node with one of the other ways."""
        return None
