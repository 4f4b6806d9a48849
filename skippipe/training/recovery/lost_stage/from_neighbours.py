"""Another node takes over the stage, rebuilt from the stages beside it.

The weights are the mean of both, each weighted with the squared norm of its gradients; the optimizer begins anew, at a
higher learning rate: CheckFree (Blagoev et al. 2025, arXiv 2506.15461).
"""

import re

import torch
from torch import Tensor

from skippipe.errors import InfeasibleError
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.training.optimizer.settings import new_state
from skippipe.training.recovery.lost_stage.situation import Situation
from skippipe.training.recovery.lost_stage.take_over import take_over
from skippipe.training.recovery.stage_state import StageState
from skippipe.training.recovery.state_source import FoundState, StateSource, WantedState
from skippipe_scheduler.plan.plan import Plan

LR_SCALE = 1.1
"""By what the learning rate of a rebuilt stage is multiplied from then on, as there."""
NUMBER = re.compile(r"\d+")
"""The first one in a parameter's name is that of its layer."""


class FromNeighbours:
    """Only for a stage between two others with as many layers; see `WayOn`."""

    def plans(self, stage: int, situation: Situation) -> PlanSet:
        """Return the plans with another node at the stage."""
        check_neighbours(situation.plans.main, stage)
        for beside in (stage - 1, stage + 1):
            if not situation.standing_nodes(beside):
                raise InfeasibleError(f"nobody has stage {beside} beside it either", stage=stage)
        return take_over(stage, situation)

    def state(self, wanted: WantedState, source: StateSource) -> FoundState | None:
        """Return the weighted mean of the neighbours."""
        try:
            check_neighbours(wanted.plan, wanted.stage)
        except InfeasibleError:
            return None
        found = [source.replica_of(beside, wanted) for beside in (wanted.stage - 1, wanted.stage + 1)]
        below, above = found
        if below is None or above is None:
            return None
        num_layers = wanted.plan.layers_per_stage[wanted.stage]
        return FoundState(rebuilt(below, above, wanted.parameters, num_layers), "its neighbours")


def check_neighbours(plan: Plan, stage: int) -> None:
    """Raise `InfeasibleError` where a stage has not two neighbours of its own number of layers."""
    layers = plan.layers_per_stage
    if not 0 < stage < len(layers) - 1:
        raise InfeasibleError(f"stage {stage} is not between two others, from which it could be rebuilt", stage=stage)
    if len({*layers[stage - 1 : stage + 2]}) > 1:
        sizes = ", ".join(map(str, layers[stage - 1 : stage + 2]))
        raise InfeasibleError(
            f"stages {stage - 1} to {stage + 1} have {sizes} layers; one is rebuilt from neighbours of its own size",
            stage=stage,
        )


def rebuilt(below: StageState, above: StageState, parameters: tuple[str, ...], num_layers: int) -> StageState:
    """Return the state of the stage between two others: the mean of its neighbours, and no moments.

    Each neighbour counts as much as the squared norm of its layers' gradients in the last step; both count the same
    where there was none. Parameters are named as in the whole model.
    """
    total = below.squared_norm + above.squared_norm
    share = below.squared_norm / total if total > 0 else 0.5
    mean: dict[str, Tensor] = {}
    for name in parameters:
        one = below.parameters[_moved_by(-num_layers, name)]
        other = above.parameters[_moved_by(num_layers, name)]
        mean[name] = (share * one.float() + (1 - share) * other.float()).to(one.dtype)
    scales = {f"{name}.lr_scale": torch.tensor(LR_SCALE) for name in mean}
    return StageState(below.step, below.elapsed_s, mean, new_state(mean) | scales)


def _moved_by(num_layers: int, name: str) -> str:
    """Return the name that a layer's parameter has so many layers further on."""
    return NUMBER.sub(lambda number: str(int(number[0]) + num_layers), name, count=1)
