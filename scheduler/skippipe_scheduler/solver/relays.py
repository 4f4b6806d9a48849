"""A plan whose messages go as in the full pipeline: nodes of the stages that a microbatch leaves out relay them."""

import numpy as np

from skippipe_scheduler.baselines.full_and_blind import as_full_pipeline
from skippipe_scheduler.bounds import lower_bounds
from skippipe_scheduler.budget import Budget
from skippipe_scheduler.options import EXACT_TASK_S, SolveOptions
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.slots.assemble import finished_plan
from skippipe_scheduler.slots.slot_model import SlotModel
from skippipe_scheduler.solver.leave_stages_out import schedule_with_relays
from skippipe_scheduler.solver.solve import SPLIT_SHARE
from skippipe_scheduler.solver.split_backward import plan_weight_gradients

_LONGER_S = 1.0
"""Seconds for which the search goes on where it has not reached the full pipeline. Chosen: half of what may be taken
beyond a time limit."""
_TEMPERATURE = 0.2
"""Temperature relative to that of other searches. Measured on 7 clusters, 1 s each, two seeds: the mean of the plan's
time over the full pipeline's is 0.999 with 0 and with 0.2, 1.004 with 1."""
_TIMINGS = 3
"""How often all tasks are timed without a search."""


def plan_with_relays(full_pipeline: Plan, problem: Problem, options: SolveOptions) -> Plan | None:
    """Return a plan of `problem` with placement and messages of the full pipeline, whose order is searched.

    None where the problem has another placement, other sizes of stages or another number of microbatches, or so many
    tasks that timing them takes too long.
    """
    from skippipe_scheduler.search.local_search import LocalSearch

    slot_model = SlotModel(as_full_pipeline(problem))
    clocked = options.max_evaluations is None
    if clocked and _TIMINGS * EXACT_TASK_S * slot_model.num_tasks > options.time_limit_s + _LONGER_S:
        return None
    start = schedule_with_relays(full_pipeline, problem, options.seed)
    if start is None:
        return None
    search = LocalSearch(slot_model, options.seed, options.robustness, repeatable=not clocked)
    found, goal_s = search.resume(start), full_pipeline.predicted.iteration_s
    if not search.inserting_takes_minutes:
        found = search.improve(options.budget(slot_model.num_tasks), temperature=_TEMPERATURE)
        if found.iteration_s > goal_s:
            longer = Budget(_LONGER_S, options.max_evaluations, options.stop)
            found = search.improve(longer, goal_s, temperature=_TEMPERATURE)
    unshared = with_best_ways(problem)
    bound_s = max(lower_bounds(unshared, 0.0).values())
    plan = finished_plan(slot_model, found, bound_s, full_pipeline.solver, full_pipeline.layers_per_stage)
    plan = plan.model_copy(update={"rules": problem.rules})
    if problem.costs.weight_s:
        plan = plan_weight_gradients(plan, unshared, options.budget().share(SPLIT_SHARE), options.seed)
    return plan


def with_best_ways(problem: Problem) -> Problem:
    """Return the problem in which messages take their fastest way over any nodes and nothing is shared.

    No plan with relays is faster than its bounds.
    """
    names = problem.nodes
    seconds = SlotModel(problem).transfer_s.copy()  # (N, N)
    for way in range(len(names)):  # Floyd and Warshall: ways over the nodes up to this one
        np.minimum(seconds, seconds[:, way, None] + seconds[way], out=seconds)
    transfer_s = {
        source: {sink: float(seconds[here, there]) for there, sink in enumerate(names) if there != here}
        for here, source in enumerate(names)
    }
    changed = {"transfer_s": transfer_s, "contention": "none", "card_gbit_per_s": None, "uplinks": None}
    return problem.model_copy(update={"costs": problem.costs.model_copy(update=changed)})
