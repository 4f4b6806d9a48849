"""What every way to go on without the nodes of a stage has to say; see `preference` for all of them."""

from typing import Protocol

from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.training.recovery.lost_stage.situation import Situation
from skippipe.training.recovery.state_source import FoundState, StateSource, WantedState


class WayOn(Protocol):
    """One way."""

    def plans(self, stage: int, situation: Situation) -> PlanSet:
        """Return the plans of all nodes, at the places by which the run goes on.

        Raises `InfeasibleError`, with the reason, where this way is not possible.
        """

    def state(self, wanted: WantedState, source: StateSource) -> FoundState | None:
        """Return the state with which a node begins that has got a stage of which no other node has the state.

        None where this way has none. Raises `CommunicationError` where the epoch ends meanwhile.
        """
