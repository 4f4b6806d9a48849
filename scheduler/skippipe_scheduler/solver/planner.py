"""From a request to its plan, alone or with the baselines beside it."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.problem.build import LayersPerStage, LayerSplitProblem
from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.solver.layer_split import choose_layers
from skippipe_scheduler.solver.no_worse import best_plan, no_worse_than_found_quickly, no_worse_than_full, why_slower
from skippipe_scheduler.solver.plan_request import PlanRequest
from skippipe_scheduler.solver.replan import replan
from skippipe_scheduler.solver.solve import solve_network_blind, solve_variants

_LEAST_PART = 0.02
"""Share of the time limit that each solve gets at least, whatever those before it took. Chosen."""


@dataclass(frozen=True)
class PlanWithBaselines:
    """A plan, and what the same nodes do without our choices; baselines are solved with the same budget.

    Examples:
        >>> result = solve_with_baselines(PlanRequest(problem, SolveOptions(max_evaluations=200)))
        >>> list(result.baselines)
        ['full pipeline', 'network-blind skipping']
    """

    problem: Problem
    plan: Plan
    full_pipeline: Plan
    network_blind: Plan
    why_slower: str = ""
    """Why the plan is slower than the full pipeline, in words, where it is."""

    @property
    def baselines(self) -> dict[str, Plan]:
        """The baselines by the name under which tables show them."""
        return {"full pipeline": self.full_pipeline, "network-blind skipping": self.network_blind}


def solve_request(request: PlanRequest) -> Plan:
    """Search the best plan for what is asked; open layers are chosen first, within the same budget.

    Where a full pipeline that is found in a moment is faster, the search goes on at it with stages left out, and nodes
    of these stages relay messages, if that helps. This may take two seconds beyond the time limit.

    Args:
        request: The problem, what of it is open, how to search and where to begin.

    Returns:
        The best plan found.

    Raises:
        InfeasibleError: No plan obeys the rules; the message names those that conflict.
        ProblemError: The plan to begin at does not fit the problem.

    Examples:
        >>> solve_request(PlanRequest(problem, SolveOptions(max_evaluations=200))).nodes == problem.nodes
        True
    """
    plan = search_request(request)
    return plan if request.warm is not None else no_worse_than_found_quickly(plan, request)


def solve_with_baselines(
    request: PlanRequest, *, announce: Callable[[str], None] = lambda title: None
) -> PlanWithBaselines:
    """Solve what is asked and both baselines, each with a third of the time limit.

    The plan is never worse than network-blind skipping, nor than the full pipeline with stages left out of its routes
    (where nobody gives the sizes of stages). Where it would be slower than the full pipeline, nodes of the stages that
    a microbatch leaves out relay its messages, if that helps. Open layers are chosen for the plan and for the full
    pipeline, each within its third; network-blind skipping gets those of the plan.

    Args:
        request: The problem, what of it is open, how to search and where to begin.
        announce: Called with the name of each solve before it starts.

    Returns:
        The plan and its baselines.

    Raises:
        InfeasibleError: No plan obeys the rules; the message names those that conflict.
        ProblemError: The plan to begin at does not fit the problem.

    Examples:
        >>> result = solve_with_baselines(PlanRequest(problem, SolveOptions(max_evaluations=200)), announce=print)
        this plan
        full pipeline
        network-blind skipping
    """
    begin_s, limit_s = perf_counter(), request.options.time_limit_s

    def with_part(part: float) -> PlanRequest:
        """Return the request with a third of the time limit, or `part` of what is left where that is less."""
        left_s = part * (limit_s - (perf_counter() - begin_s))
        return request.with_options(time_limit_s=max(_LEAST_PART * limit_s, min(limit_s / 3, left_s)))

    third = with_part(1 / 3)
    announce("this plan")
    plan = search_request(third)
    announce("full pipeline")
    full_pipeline = _solve_variants(with_part(1 / 2), third.full_pipelines, third.full_pipelines_beside)
    plan = no_worse_than_full(plan, full_pipeline, third)
    announce("network-blind skipping")
    chosen = third.resolve(plan)
    options = with_part(1.0).options
    blind = solve_network_blind(chosen, options, stages=tuple(stage.nodes for stage in plan.stages))
    blind = _bound_like(plan, blind)
    if best_plan((plan, blind), options) is blind:
        plan = blind.model_copy(update={"solver": plan.solver})
    slower = plan.predicted.iteration_s > full_pipeline.predicted.iteration_s
    return PlanWithBaselines(
        chosen, plan, full_pipeline, blind, why_slower(plan, full_pipeline, third) if slower else ""
    )


def search_request(request: PlanRequest) -> Plan:
    """Search as `solve_request` does, within the time limit, without a look at any full pipeline."""
    if request.warm is None:
        return _solve_variants(request, request.variants, request.beside)
    problem = request.resolve(request.warm)
    return replan(request.warm, problem, request.options, layers=request.layers_per_stage)


def _bound_like(plan: Plan, blind: Plan) -> Plan:
    """Return a plan with the bound of another for the same request: its own is weaker, found in no time."""
    bound_s = min(plan.predicted.lower_bound_s, blind.predicted.iteration_s)
    return blind.model_copy(update={"predicted": blind.predicted.model_copy(update={"lower_bound_s": bound_s})})


def _solve_variants(
    request: PlanRequest,
    variants: Callable[[Problem], list[Problem]],
    beside: Callable[[LayersPerStage | None], list[Problem]],
) -> Plan:
    problem, options = request.problem, request.options
    if isinstance(problem, LayerSplitProblem):
        problem, options = choose_layers(problem, options, variants)
    others = beside(problem.stage_layers)
    return solve_variants(variants(problem), options, layers=request.layers_per_stage, beside=others)
