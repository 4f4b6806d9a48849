"""Solving a problem: the best plan within a time limit, and the baselines it is compared with."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from skippipe_scheduler.baselines.full_and_blind import full_pipeline_problem, network_blind
from skippipe_scheduler.bounds import lower_bounds
from skippipe_scheduler.budget import Budget
from skippipe_scheduler.options import SolveOptions
from skippipe_scheduler.plan.plan import Plan, Solver
from skippipe_scheduler.problem.infeasibility import check_feasible
from skippipe_scheduler.problem.problem import Problem, StageNodes
from skippipe_scheduler.search.kernel.jit import prepare
from skippipe_scheduler.slots.assemble import finished_plan
from skippipe_scheduler.slots.slot_model import SlotModel
from skippipe_scheduler.solver.split_backward import plan_weight_gradients

if TYPE_CHECKING:
    from skippipe_scheduler.search.portfolio import PortfolioSearch
    from skippipe_scheduler.slots.solution import Solution

SPLIT_SHARE = 0.15
"""Part of the budget that goes into splitting backwards, where the problem allows it. Chosen."""
BLIND_PLACEMENT_PART = 0.2
"""Share of the budget in which the network-blind baseline gets a placement, where none is given. Chosen."""
BLIND_ROUTES_PART = 0.8
"""Share of what is left then in which it gets its routes. Chosen: the rest times them at the true costs."""

__all__ = ["SolveOptions", "solve", "solve_full_pipeline", "solve_network_blind", "solve_variants"]


def solve(
    problem: Problem, options: SolveOptions, *, layers: Sequence[int] | None = None, warm: "Solution | None" = None
) -> Plan:
    """Search the best plan of a problem: placement, routes and order, with predicted times and a lower bound.

    Where the problem gives `costs.weight_s`, a part of the budget goes into splitting backwards.

    Args:
        problem: What to plan.
        options: How long and how to search.
        layers: Layers of each stage; the problem's `stage_layers` where not given, or one per stage.
        warm: Where the search begins; `replan` makes it of an older plan.

    Returns:
        The best plan found.

    Raises:
        InfeasibleError: No plan can exist; the message names the rules that conflict.
        ProblemError: `layers` does not fit the problem.

    Examples:
        >>> plan = solve(problem, SolveOptions(max_evaluations=100))
        >>> plan.visits  # each microbatch visits stage 0 and one of the others
        (6, 3, 3)
        >>> plan.predicted.lower_bound_s <= plan.predicted.iteration_s
        True
    """
    return _solve_best([problem], options, layers, warm)


def solve_full_pipeline(problem: Problem, options: SolveOptions) -> Plan:
    """Search the best plan whose microbatches visit every stage in order: a baseline.

    Args:
        problem: The problem; what its rules say about length, swaps and coverage of routes is left aside. Stage sizes
            are as even as possible, and the placement is free but for pinned nodes, also where the problem gives one.
        options: How long and how to search.

    Returns:
        The best plan found.

    Raises:
        InfeasibleError: No plan can exist; the message names the rules that conflict.

    Examples:
        >>> full = solve_full_pipeline(problem, SolveOptions(max_evaluations=50))
        >>> full.visits
        (6, 6, 6)
    """
    return solve_variants(full_pipeline_problem(problem), options)


def solve_variants(
    variants: Sequence[Problem],
    options: SolveOptions,
    *,
    layers: Sequence[int] | None = None,
    beside: Sequence[Problem] = (),
) -> Plan:
    """Return the best plan over several variants of one problem, which share the budget; `layers` as for `solve`.

    The variants `beside` them are searched only where a schedule made without a search is better there.
    """
    return _solve_best(variants, options, layers, None, beside)


def solve_network_blind(problem: Problem, options: SolveOptions, stages: Sequence[Sequence[str]] | None = None) -> Plan:
    """Search a plan whose routes are chosen as if all links and nodes were alike: a baseline, timed with true costs.

    The order is the better of the blind one and first-come insertions at the true costs, so that the plan
    cannot deadlock.

    Args:
        problem: What to plan.
        options: How long and how to search.
        stages: Nodes of each stage, usually those of the plan it is compared with; where not given, and the problem
            leaves it free, a part of the budget goes into the placement.

    Returns:
        The best such plan found.

    Raises:
        InfeasibleError: No plan can exist; the message names the rules that conflict.

    Examples:
        >>> nodes = [stage.nodes for stage in plan.stages]
        >>> blind = solve_network_blind(problem, SolveOptions(max_evaluations=50), nodes)
        >>> blind.visits, [stage.nodes for stage in blind.stages] == nodes
        ((6, 3, 3), True)
    """
    from skippipe_scheduler.search.local_search import LocalSearch

    fixed = _fix(problem, stages)
    budget = options.budget(SlotModel(fixed).num_tasks)
    check_feasible(fixed)
    if fixed.stages is None:
        found = _portfolio_search([SlotModel(fixed)], options, budget.share(BLIND_PLACEMENT_PART)).run()
        fixed = _fix(fixed, found.slot_model.stages(found.solution.placement))
    slot_model = SlotModel(fixed)
    searched = BLIND_ROUTES_PART * (1 - SPLIT_SHARE if fixed.costs.weight_s else 1.0)
    blind = _portfolio_search([SlotModel(network_blind(fixed))], options, budget.share(searched)).run()
    search = LocalSearch(slot_model, options.seed)
    solution = min(
        search.resume(blind.solution),
        search.greedy_insert(blind.solution, budget),
        key=lambda candidate: candidate.iteration_s,
    )
    bound_s = max(lower_bounds(problem, 0.0).values())
    plan = finished_plan(slot_model, solution, bound_s, _solver(options, budget), None)
    return _split(plan, fixed, budget, options)


def _split(plan: Plan, problem: Problem, budget: Budget, options: SolveOptions) -> Plan:
    """Split backwards where the problem says what their weight gradients take."""
    if not problem.costs.weight_s:
        return plan
    divided = plan_weight_gradients(plan, problem, budget.share(1.0), options.seed)
    return divided.model_copy(update={"solver": _solver(options, budget)})


def _fix(problem: Problem, stages: Sequence[Sequence[str]] | None) -> Problem:
    if stages is None:
        return problem
    update = {"stages": tuple(StageNodes(nodes=tuple(nodes)) for nodes in stages), "stage_sizes": None}
    update["pinned"] = None
    return problem.model_copy(update=update)


def _solve_best(
    variants: Sequence[Problem],
    options: SolveOptions,
    layers: Sequence[int] | None,
    warm: "Solution | None",
    beside: Sequence[Problem] = (),
) -> Plan:
    slot_models = [SlotModel(problem) for problem in variants]
    budget = options.budget(slot_models[0].num_tasks)
    for problem in variants:
        check_feasible(problem)
    splits = any(problem.costs.weight_s for problem in variants)
    searched = budget.share(1 - SPLIT_SHARE) if splits else budget
    portfolio = _portfolio_search(slot_models, options, searched)
    portfolio.progress = options.progress
    portfolio.beside = [SlotModel(problem) for problem in beside]
    found = portfolio.run(warm)
    if splits:
        budget.charge(searched)
    bound_s = portfolio.bound_s
    if any(found.slot_model is variant for variant in portfolio.beside):
        bound_s = max(lower_bounds(found.slot_model.problem, 0.0).values())
    plan = finished_plan(found.slot_model, found.solution, bound_s, _solver(options, budget), layers)
    return _split(plan, found.slot_model.problem, budget, options)


def _portfolio_search(slot_models: list[SlotModel], options: SolveOptions, budget: Budget) -> "PortfolioSearch":
    # The kernel is imported here, because compiling it may not be worth its time.
    prepare(options.time_limit_s if options.max_evaluations is None else None)
    from skippipe_scheduler.search.portfolio import PortfolioSearch

    return PortfolioSearch(slot_models, budget, options.seed, options.num_workers, options.robustness)


def _solver(options: SolveOptions, budget: Budget) -> Solver:
    try:
        release = version("skippipe")
    except PackageNotFoundError:
        release = "unknown"
    return Solver(
        name="skippipe insertion and large neighbourhood search",
        version=release,
        seed=options.seed,
        time_limit_s=0.0 if budget.repeatable else options.time_limit_s,
        wall_s=0.0 if budget.repeatable else round(budget.elapsed_s, 3),
    )
