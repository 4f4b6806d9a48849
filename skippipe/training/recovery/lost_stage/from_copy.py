"""Another node takes over the stage from the copy in the memory of a node."""

from skippipe.errors import InfeasibleError
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.training.recovery.lost_stage.situation import Situation
from skippipe.training.recovery.lost_stage.take_over import take_over
from skippipe.training.recovery.state_source import FoundState, StateSource, WantedState


class FromCopy:
    """The node that has the newest copy takes the stage over, where it can; see `WayOn`."""

    def plans(self, stage: int, situation: Situation) -> PlanSet:
        """Return the plans with that node at the stage."""
        copies = situation.copies.get(stage, {})
        if not copies:
            raise InfeasibleError(f"nobody has a copy of stage {stage}", stage=stage)
        newest = max(copies.values())
        return take_over(stage, situation, [node for node, step in copies.items() if step == newest])

    def state(self, wanted: WantedState, source: StateSource) -> FoundState | None:
        """Return the newest copy."""
        found = source.copy_of(wanted.stage)
        return None if found is None else FoundState(found, "a copy")
