"""One trace over one plan, by all methods beside each other."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from skippipe.planning.churn.churn_costs import ChurnCosts, best_interval_s
from skippipe.planning.churn.failure_trace import FailureTrace
from skippipe.planning.churn.methods import (
    CheckpointRestart,
    FixedSizeRestart,
    InRunRecovery,
    RecoveryMethod,
    RedundantComputation,
    StageRebuilding,
)
from skippipe.planning.churn.replay import ReplayedRun, replay
from skippipe.planning.churn.surviving_paces import SurvivingPaces
from skippipe_scheduler.options import LostStage
from skippipe_scheduler.plan.plan import Plan

RARE_CHECKPOINT_S = 1800.0
"""Seconds between checkpoints that are rarely needed. Chosen."""


@dataclass(frozen=True)
class ChurnOptions:
    """What is assumed of the methods."""

    costs: ChurnCosts = field(default_factory=ChurnCosts)
    lost_stage: LostStage = "routes_around"
    parameters: float = 0.0
    """Of the whole model, for state transfers."""
    max_evaluations: int = 300
    """Steps of the search for the plan of every set of nodes."""


@dataclass(frozen=True)
class ChurnComparison:
    """What all methods make of a trace; ours is the first of `runs`."""

    plan: Plan
    trace: FailureTrace
    options: ChurnOptions
    interval_s: float
    """Seconds between the checkpoints of checkpoint-restart."""
    num_planned: int
    """Sets of nodes that plans were made for."""
    runs: Mapping[str, ReplayedRun]

    def notes(self) -> list[str]:
        """Return what the numbers rest on, in words."""
        notes = [f"plans were made for {self.num_planned} sets of nodes, by the planner that a run asks after a loss"]
        if math.isfinite(self.interval_s):
            notes.append(f"checkpoint-restart writes every {self.interval_s:.1f} s, the best interval for these losses")
        if not self.options.parameters:
            notes.append("transfers of state take no time here; with --parameters they do")
        return notes


def compare_methods(
    plan: Plan, trace: FailureTrace, options: ChurnOptions, paces: SurvivingPaces | None = None
) -> ChurnComparison:
    """Replay a trace over a plan by ours and by all others of `methods`.

    Checkpoint-restart has the best interval for this trace's mean time between losses (`best_interval_s`). The
    others, which need one only where a state is lost with all that hold it, have the better one of that interval and
    `RARE_CHECKPOINT_S`. Equal arguments give equal results. With the `paces` of an earlier comparison over the same
    plan, its plans for the nodes that are left are not made again.
    """
    if paces is None:
        paces = SurvivingPaces(plan, max_evaluations=options.max_evaluations)
    costs, parameters = options.costs, options.parameters
    interval_s = best_interval_s(costs.checkpoint, trace.mtbf_s) if costs.checkpoint else plan.predicted.iteration_s

    def better_of_both(make: Callable[[float], RecoveryMethod]) -> ReplayedRun:
        return max((replay(trace, make(every_s)) for every_s in (interval_s, RARE_CHECKPOINT_S)), key=_goodput)

    runs = (
        better_of_both(lambda every_s: InRunRecovery(paces, costs, every_s, parameters, lost_stage=options.lost_stage)),
        replay(trace, CheckpointRestart(paces, costs, interval_s, parameters)),
        replay(trace, FixedSizeRestart(paces, costs, interval_s, parameters)),
        better_of_both(lambda every_s: RedundantComputation(paces, costs, every_s, parameters)),
        better_of_both(lambda every_s: StageRebuilding(paces, costs, every_s, parameters)),
    )
    return ChurnComparison(plan, trace, options, interval_s, paces.num_planned, {run.method: run for run in runs})


def _goodput(run: ReplayedRun) -> float:
    return run.goodput
