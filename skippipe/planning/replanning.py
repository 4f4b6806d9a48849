"""The plans of a run for the nodes that are left, when some are lost."""

from collections.abc import Collection

from skippipe.runtime.plans.plan_set import MAIN_PLAN, PlanSet
from skippipe_scheduler.options import SolveOptions
from skippipe_scheduler.solver.lost_nodes import replan_without


def replan_set(plans: PlanSet, lost: Collection[str], *, time_limit_s: float, seed: int) -> PlanSet:
    """Return all plans of a run without the lost nodes; nodes that are left keep their stage.

    Args:
        plans: The plans of all nodes; those of fewer nodes are always made from these.
        lost: Names of the nodes that are lost.
        time_limit_s: How long the search for all of them may take; with 0 their routes are only mended.
        seed: Seed of the search's random choices.

    Raises:
        InfeasibleError: A stage has no node left; the message names it.
    """
    options = SolveOptions(time_limit_s=time_limit_s / len(plans), seed=seed)
    replanned = {name: replan_without(plan, lost, options) for name, plan in plans.items()}
    return PlanSet(replanned.pop(MAIN_PLAN), replanned)
