"""A plan that is no worse than the baselines computed with it, and why it may be all the same.

The full pipeline is no plan where stages are to be left out, but its placement and order with stages left out are.
Where a link past such a stage is slower than the two by way of it, a node of that stage may relay the messages, so that
they go as in the full pipeline. Network-blind skipping is a plan as it is.
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from time import perf_counter

from skippipe_scheduler.analysis.jitter import sample_iterations
from skippipe_scheduler.baselines.full_and_blind import as_full_pipeline
from skippipe_scheduler.options import EXACT_TASK_S, SolveOptions
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.simulate import simulate
from skippipe_scheduler.problem.build import LayerSplitProblem
from skippipe_scheduler.problem.problem import Problem, StageNodes
from skippipe_scheduler.problem.stage_sizes import resized
from skippipe_scheduler.slots.slot_model import SlotModel
from skippipe_scheduler.slots.solution import Solution
from skippipe_scheduler.solver.leave_stages_out import schedules_without_stages
from skippipe_scheduler.solver.plan_request import PlanRequest
from skippipe_scheduler.solver.relays import plan_with_relays
from skippipe_scheduler.solver.solve import solve, solve_variants

_PART = 0.25
"""Share of a solve's budget for the search that goes on where the full pipeline is the better start. Chosen."""
_QUICK_S, _QUICK_PART = 0.5, 0.25
"""Seconds for a full pipeline that nobody asked for, and their share of a solve's budget at most. Chosen: of 150 random
clusters (2 s each) 8 had plans slower than the full pipeline by 5% and more; this mends 4 of them in one run and 7 in
another."""
_BEYOND_S = 2.0
"""Seconds that all of this may take: what a plan may take beyond its time limit."""
_GOES_ON_S = 1.0
"""Budget in seconds of the search that goes on from there, at most. Chosen: half of them."""
_TIMINGS = 6
"""How often all tasks are timed then. Measured."""
_JUDGED_PART = 0.1
"""Share of the time limit that may go into the mean times of two plans under jitter. Chosen."""


def no_worse_than_full(plan: Plan, full_pipeline: Plan, request: PlanRequest) -> Plan:
    """Return the best of a plan and of the full pipeline with stages left out, where the request allows its sizes."""
    if plan.rules == full_pipeline.rules and request.leaves_sizes_open(request.resolve(full_pipeline)):
        return best_plan((plan, full_pipeline), request.options)
    options = _part_of(request.options, _PART)
    problem = _problem_of(full_pipeline, request)
    if problem is not None:
        plan = _better_of_direct(plan, full_pipeline, problem, request, options)
    if plan.predicted.iteration_s <= full_pipeline.predicted.iteration_s:
        return plan
    if problem is None:  # its own stages have a full pipeline, too
        problem = request.resolve(plan)
        full_pipeline = solve(as_full_pipeline(problem), options, layers=request.layers_per_stage)
    relayed = plan_with_relays(full_pipeline, problem, options)
    return plan if relayed is None else best_plan((plan, relayed), request.options)


def no_worse_than_found_quickly(plan: Plan, request: PlanRequest) -> Plan:
    """Return a plan, or a better one where a full pipeline is that is found in a moment beyond the request's budget.

    Where all tasks take too long to time, it is the plan.
    """
    problem, options = request.resolve(plan), request.options
    if problem.rules.lengths == (problem.num_stages,):
        return plan
    if options.max_evaluations is None and _TIMINGS * _timing_s(plan) > _BEYOND_S:
        return plan
    quick = _part_of(options, _QUICK_PART)
    quick = replace(quick, time_limit_s=min(_QUICK_S, quick.time_limit_s), progress=None)
    layers = plan.layers_per_stage
    even = request.even(layers) if request.leaves_sizes_open(problem) else None
    problems = [problem] if even is None or even.sizes == problem.sizes else [problem, even]
    full_pipelines, beside = [as_full_pipeline(each) for each in problems], request.full_pipelines_beside(layers)
    full_pipeline = solve_variants(full_pipelines, quick, layers=request.layers_per_stage, beside=beside)
    if plan.predicted.iteration_s <= full_pipeline.predicted.iteration_s:
        return plan
    request = request.with_options(time_limit_s=min(_GOES_ON_S, options.time_limit_s))
    return no_worse_than_full(plan, full_pipeline, request)


def _part_of(options: SolveOptions, part: float) -> SolveOptions:
    """Return the options with a part of the time limit and of the steps."""
    steps = options.max_evaluations
    steps = None if steps is None else max(1, int(part * steps))
    return replace(options, time_limit_s=part * options.time_limit_s, max_evaluations=steps)


def _timing_s(plan: Plan) -> float:
    """Return the seconds that timing all tasks takes, as measured."""
    begin_s = perf_counter()
    simulate(plan)
    return perf_counter() - begin_s


def _better_of_direct(
    plan: Plan, full_pipeline: Plan, problem: Problem, request: PlanRequest, options: SolveOptions
) -> Plan:
    """Return the better of a plan and of what a search makes of the full pipeline with stages left out."""
    start = _best_start(full_pipeline, problem, request.options)
    # What the search makes of a start may be much shorter: it splits backwards, and balances loads of shared cards.
    gains = problem.costs.weight_s is not None or SlotModel(problem).shares_capacity
    if start is None or (start.iteration_s >= plan.predicted.iteration_s and not gains):
        return plan
    found = solve(problem, options, layers=request.layers_per_stage, warm=start)
    return best_plan((plan, found), request.options)


def best_plan(plans: Sequence[Plan], options: SolveOptions) -> Plan:
    """Return the plan that takes least, on the mean over jitter where plans are judged by that.

    Where that mean takes too long to find, it is the first.
    """
    jitter = options.robustness
    if jitter is not None and options.max_evaluations is None:
        num_tasks = sum(len(tasks) for plan in plans for tasks in plan.order.values())
        if jitter.samples * num_tasks * EXACT_TASK_S > _JUDGED_PART * options.time_limit_s:
            return plans[0]

    def judged_s(plan: Plan) -> float:
        if jitter is None:
            return plan.predicted.iteration_s
        return fmean(sample_iterations(plan, jitter.samples, jitter_sigma=jitter.sigma, seed=options.seed))

    return min(plans, key=judged_s)


def why_slower(plan: Plan, full_pipeline: Plan, request: PlanRequest) -> str:
    """Return why a plan may be slower than the full pipeline, in words."""
    if request.options.robustness is not None:
        return "it is judged by its mean under jitter, not by the time without any that stands here"
    if _problem_of(full_pipeline, request) is None:
        return "its stages have other sizes or nodes, which are given or which memory asks for"
    return (
        "past a stage left out its routes take slower links than through that stage, and no faster plan with relays "
        "there was found in this time"
    )


def _problem_of(full_pipeline: Plan, request: PlanRequest) -> Problem | None:
    """Return the problem with the sizes and layers of the full pipeline, where the request allows them."""
    asked = request.problem
    problem = asked.with_layers(full_pipeline.layers_per_stage) if isinstance(asked, LayerSplitProblem) else asked
    sizes = tuple(len(stage.nodes) for stage in full_pipeline.stages)
    held = tuple(stage.nodes for stage in full_pipeline.stages)
    if problem.stages is not None:
        return problem if problem.stages == tuple(StageNodes(nodes=nodes) for nodes in held) else None
    if sizes == problem.sizes:
        return problem
    layers = full_pipeline.layers_per_stage
    same = next((other for other in request.beside(layers) if other.sizes == sizes), None)
    even = request.even(layers)
    if same is None and even is not None and min(sizes) >= min(even.sizes):
        return resized(even, sizes)
    return same


def _best_start(full_pipeline: Plan, problem: Problem, options: SolveOptions) -> Solution | None:
    from skippipe_scheduler.search.local_search import LocalSearch

    slot_model = SlotModel(problem)
    search = LocalSearch(slot_model, options.seed, repeatable=options.max_evaluations is not None)
    found = [search.repair(start) for start in schedules_without_stages(full_pipeline, problem, options.seed)]
    return min(found, key=lambda start: start.key, default=None)
