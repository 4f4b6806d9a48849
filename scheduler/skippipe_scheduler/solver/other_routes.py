"""Another plan beside a given one: the same nodes, stages, costs and number of microbatches, routes by other rules."""

from collections import Counter

from skippipe_scheduler.errors import ProblemError
from skippipe_scheduler.options import SolveOptions
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.problem.problem import AutoMicrobatches, EvenMicrobatches, Problem, StageNodes
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.solver.plan_request import PlanRequest


def other_routes_problem(plan: Plan, rules: Rules, *, free_origins: bool = False) -> Problem:
    """Return the problem of routing the microbatches of `plan` over its placement by `rules`, at its own costs.

    Raises `ProblemError` where the rules are for another number of stages, or the plan has absent stages.
    """
    if rules.num_stages != len(plan.stages):
        raise ProblemError(f"the plan has {len(plan.stages)} stages, the rules are for {rules.num_stages}")
    if plan.rules.absent_stages:
        raise ProblemError(f"the plan leaves out stage {plan.rules.absent_stages[0]}; begin at the plan of all nodes")
    total = len(plan.microbatches)
    return Problem(
        about="beside another plan",
        nodes=plan.nodes,
        regions=plan.regions,
        stages=tuple(StageNodes(nodes=stage.nodes) for stage in plan.stages),
        microbatches_per_origin=AutoMicrobatches(auto=total) if free_origins else EvenMicrobatches(even=total),
        costs=plan.costs,  # of each node at its stage, so the stages' layers are in them
        rules=rules,
    )


def other_routes_request(plan: Plan, rules: Rules, options: SolveOptions, *, free_origins: bool = False) -> PlanRequest:
    """Return what is asked of the planner for routes by `rules` on the placement of `plan`; raises as the problem."""
    problem = other_routes_problem(plan, rules, free_origins=free_origins)
    return PlanRequest(problem, options, layers_per_stage=plan.layers_per_stage)


def route_distance(first: Plan, second: Plan) -> float:
    """Return the share of the microbatches whose routes two plans do not have in common, whatever their numbers."""
    routes = [Counter(microbatch.route for microbatch in plan.microbatches) for plan in (first, second)]
    return (routes[0] - routes[1]).total() / len(first.microbatches)
