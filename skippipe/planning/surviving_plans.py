"""The plans of a run on the nodes that are left: the main one and those of its recipe, together in a given time."""

import time
from collections import Counter
from collections.abc import Collection

from skippipe.errors import SkipPipeError
from skippipe.runtime.plans.plan_set import MAIN_PLAN, PlanSet
from skippipe_scheduler.options import LostStage, SolveOptions
from skippipe_scheduler.plan.plan import Plan


def plans_without(
    plans: PlanSet,
    lost: Collection[str],
    *,
    time_limit_s: float,
    max_evaluations: int | None = None,
    lost_stage: LostStage = "stop",
) -> PlanSet:
    """Return the plans of a run without the lost nodes; `plans` are those of all nodes.

    Every plan is mended at least, which takes milliseconds for tens of nodes; they share the seconds of `time_limit_s`
    for what is searched beyond that, or have `max_evaluations` steps each in place of the clock. Each has the seed that
    it was made with. Raises what `replan_without` raises, naming a further plan.
    """
    begun_s = time.perf_counter()
    found: dict[str, Plan] = {}
    for turn, (name, plan) in enumerate(plans.items()):
        left_s = max(0.0, time_limit_s - (time.perf_counter() - begun_s))
        options = SolveOptions(
            time_limit_s=left_s / (len(plans) - turn), seed=plan.solver.seed, max_evaluations=max_evaluations
        )
        found[name] = _plan_without(name, plan, lost, options, lost_stage)
    return plans.replaced(found)


def improved_plans(
    plans: PlanSet, *, time_limit_s: float, max_evaluations: int | None = None, free_origins: bool = False
) -> PlanSet:
    """Return the plans of a run on the same nodes at the same places, after a search of `time_limit_s` in all.

    Or of `max_evaluations` steps each, in place of the clock. Origins have even shares of the microbatches where they
    have them in the plan, unless `free_origins` leaves that to the search.
    """
    limit_s = time_limit_s / len(plans)
    found = {
        name: _improved(plan, SolveOptions(limit_s, plan.solver.seed, max_evaluations), free_origins)
        for name, plan in plans.items()
    }
    return plans.replaced(found)


def _improved(plan: Plan, options: SolveOptions, free_origins: bool) -> Plan:
    from skippipe_scheduler.solver.other_routes import other_routes_problem
    from skippipe_scheduler.solver.replan import replan

    started = Counter(microbatch.route[0] for microbatch in plan.microbatches)
    shares = [started[node] for node in plan.stages[0].nodes]
    problem = other_routes_problem(plan, plan.rules, free_origins=free_origins or max(shares) - min(shares) > 1)
    return replan(plan, problem, options, layers=plan.layers_per_stage)


def _plan_without(name: str, plan: Plan, lost: Collection[str], options: SolveOptions, lost_stage: LostStage) -> Plan:
    # The search loads OR-tools and numba, about a second: one rank of a run needs it, and only when nodes are lost.
    from skippipe_scheduler.solver.lost_nodes import replan_without

    try:
        return replan_without(plan, lost, options, lost_stage=lost_stage)
    except SkipPipeError as reason:
        if name == MAIN_PLAN:
            raise
        raise type(reason)(f"the recipe's plan {name!r}: {reason}") from None
