"""The SkipPipe paper's method from end to end: place nodes, then find paths, then run them as they come."""

from collections.abc import Iterator, Sequence

from skippipe_scheduler.baselines.dispatch import solutions_by_rule
from skippipe_scheduler.baselines.paper_method.agents import Agent, groupings
from skippipe_scheduler.baselines.paper_method.conflict_search import path_sets
from skippipe_scheduler.baselines.paper_method.genetic_placement import genetic_placement
from skippipe_scheduler.bounds import lower_bounds
from skippipe_scheduler.budget import Budget
from skippipe_scheduler.plan.plan import Plan, Solver
from skippipe_scheduler.problem.infeasibility import check_feasible
from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.slots.assemble import finished_plan
from skippipe_scheduler.slots.routes import priced_routes
from skippipe_scheduler.slots.slot_model import SlotCosts, SlotModel, SlotRoute
from skippipe_scheduler.slots.solution import Solution

_PLACEMENT_SHARE = 0.4
"""Share of the budget for the placement. Chosen: the paper does not say."""
_MAX_ROUNDS = 12
"""Times that the effort of the path search doubles at most. Chosen: no budget lasts longer."""


def solve_paper_method(
    problem: Problem, budget_s: float = 60.0, seed: int = 0, *, max_generations: int | None = None
) -> Plan:
    """Solve a problem by the method of the SkipPipe paper (arXiv 2502.19913), timed exactly.

    A genetic algorithm places the nodes (`genetic_placement.py`), conflict-based search finds one path per agent
    (`conflict_search.py`), and each set of paths is run by dispatch rules. The paper's executor takes tasks as they
    come and prefers backwards; here every rule of `dispatch.py` is tried, so that the method is judged by its routes.
    It is meant for up to about a hundred nodes; where no path set is found in time, the routes are
    `routes.priced_routes`.

    Args:
        problem: What to plan.
        budget_s: Seconds of wall-clock time.
        seed: Seed of the random choices.
        max_generations: A budget in place of the clock: so many children are bred and so many nodes of the path search
            expanded. Equal seeds then give equal plans.

    Returns:
        The best plan found. Its lower bound is one of the quick ones.

    Raises:
        InfeasibleError: No plan can exist; the message names the rules that conflict.

    Examples:
        >>> by_paper = solve_paper_method(problem, max_generations=20)
        >>> by_paper.solver.name
        "SkipPipe paper's method"
        >>> by_paper.visits
        (6, 3, 3)
    """
    budget = Budget(budget_s, max_generations)
    slot_model = SlotModel(problem)
    check_feasible(problem)
    placement = slot_model.given_placement()
    if placement is None:
        placement = genetic_placement(slot_model, budget if budget.repeatable else budget.share(_PLACEMENT_SHARE), seed)
        budget.spent = 0
    costs = SlotCosts(slot_model, placement)
    best: Solution | None = None
    for routes in route_sets(costs, budget, seed):
        solution = best_run(costs, routes)
        if best is None or solution.iteration_s < best.iteration_s:
            best = solution
    best = best or best_run(costs, priced_routes(costs, seed))
    solver = Solver(
        name="SkipPipe paper's method",
        version="1",
        seed=seed,
        time_limit_s=0.0 if budget.repeatable else budget_s,
        wall_s=0.0 if budget.repeatable else round(budget.elapsed_s, 3),
    )
    return finished_plan(slot_model, best, max(lower_bounds(problem, budget_s=0.0).values()), solver, None)


def route_sets(costs: SlotCosts, budget: Budget, seed: int) -> Iterator[tuple[SlotRoute, ...]]:
    """Yield a route per microbatch, from the coarsest agents to single microbatches, again with twice the effort."""
    sets = groupings(costs.slot_model, seed)
    for effort in (2**turn for turn in range(_MAX_ROUNDS)):
        for left, agents in zip(range(len(sets), 0, -1), sets, strict=True):
            share = budget.share(1 / left)
            for paths in path_sets(costs, agents, share, seed, effort):
                yield _route_of_each(costs.slot_model, agents, paths)
            share.spent += 1
            budget.charge(share)
        if budget.exhausted:
            return


def _route_of_each(slot_model: SlotModel, agents: Sequence[Agent], paths: Sequence[SlotRoute]) -> tuple[SlotRoute, ...]:
    """Return the routes in order of origin; the agents of an origin take turns, wave by wave."""
    waiting: dict[int, list[tuple[int, SlotRoute]]] = {}
    for agent, path in zip(agents, paths, strict=True):
        waiting.setdefault(agent.origin, []).extend((turn, path) for turn in range(agent.size))
    for routes in waiting.values():
        routes.sort(key=lambda turn_and_path: turn_and_path[0])
    return tuple(path for origin in slot_model.slots_of[0] for _, path in waiting.get(origin, []))


def best_run(costs: SlotCosts, routes: Sequence[SlotRoute]) -> Solution:
    """Return the shortest schedule that a dispatch rule makes of `routes`."""
    return min(solutions_by_rule(costs, routes).values(), key=lambda solution: solution.iteration_s)
