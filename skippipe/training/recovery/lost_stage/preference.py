"""The ways in which a run can go on without the nodes of a stage, and which one it takes."""

from collections.abc import Mapping, Sequence
from typing import Final

from skippipe.config.recovery_options import LostStageWay
from skippipe.errors import InfeasibleError, SkipPipeError
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.training.recovery.lost_stage.around import RoutesAround
from skippipe.training.recovery.lost_stage.from_checkpoint import FromCheckpoint
from skippipe.training.recovery.lost_stage.from_copy import FromCopy
from skippipe.training.recovery.lost_stage.from_neighbours import FromNeighbours
from skippipe.training.recovery.lost_stage.situation import Situation
from skippipe.training.recovery.lost_stage.stopping import Stop
from skippipe.training.recovery.lost_stage.way_on import WayOn

WAYS: Final[Mapping[LostStageWay, WayOn]] = {
    "copy": FromCopy(),
    "routes_around": RoutesAround(),
    "rebuild": FromNeighbours(),
    "checkpoint": FromCheckpoint(),
    "stop": Stop(),
}
ON_RETURN: Final[Sequence[LostStageWay]] = ("copy", "checkpoint")
"""From what a stage goes on that routes have left out, unless the order names one of these itself."""


def places_without(situation: Situation, order: Sequence[LostStageWay]) -> PlanSet:
    """Return the plans of all nodes, at the places by which the run goes on without those that are lost.

    Raises `InfeasibleError`, with all reasons, where no way of the order is possible for a stage without any node.
    """
    for stage in situation.lost_stages:
        situation = situation.moved(_places_without(stage, situation, order))
    return situation.plans


def ways_to_state(order: Sequence[LostStageWay]) -> list[WayOn]:
    """Return where a node looks for the state of a stage that nobody else has, the first choice first."""
    last = ON_RETURN if "routes_around" in order else ()
    return [WAYS[name] for name in dict.fromkeys([*order, *last])]


def _places_without(stage: int, situation: Situation, order: Sequence[LostStageWay]) -> PlanSet:
    reasons = []
    for name in order:
        try:
            return WAYS[name].plans(stage, situation)
        except SkipPipeError as reason:
            reasons.append(f"{name}: {reason}")
    lost = situation.plans.main.stages[stage]
    raise InfeasibleError(
        f"stage {stage} (layers {lost.layers[0]} to {lost.layers[1] - 1}) has no node left: "
        f"{', '.join(map(repr, lost.nodes))} lost; the run ends, as no way of recovery.lost_stage is possible "
        f"({'; '.join(reasons)}). Start it again, and it continues from its checkpoint",
        stage=stage,
    )
