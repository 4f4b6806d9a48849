"""Plans made from older plans: what can stay stays, the rest is found again."""

from collections.abc import Sequence
from statistics import fmean

import pytest
from random_plans import with_relays
from small_problems import make_problem

from skippipe_scheduler.errors import InfeasibleError
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.solver.replan import replan, without_node
from skippipe_scheduler.solver.solve import SolveOptions, solve

PROBLEM = make_problem(5, [3, 2, 2, 2], 3, 12, fixed=False, distance=3)
PLAN = solve(PROBLEM, SolveOptions(max_evaluations=8000))


def slower(problem: Problem, node: str, factor: float) -> Problem:
    costs = problem.costs
    update = {
        name: {**getattr(costs, name), node: getattr(costs, name)[node] * factor}
        for name in ("forward_s", "backward_s")
    }
    return problem.model_copy(update={"costs": costs.model_copy(update=update)})


@pytest.mark.parametrize("node", PROBLEM.nodes)
def test_any_node_can_be_lost(node: str) -> None:
    smaller = without_node(PROBLEM, PLAN, node)
    found = replan(PLAN, smaller, SolveOptions(max_evaluations=1))
    validate(found)
    assert node not in found.nodes
    assert sorted(found.nodes) == sorted(set(PLAN.nodes) - {node})
    assert len(found.microbatches) == len(PLAN.microbatches)
    kept = sum(new.route == old.route for new, old in zip(found.microbatches, PLAN.microbatches, strict=True))
    through = sum(node in microbatch.route for microbatch in PLAN.microbatches)
    assert kept > 0 or through > 6


def test_a_little_search_comes_near_a_long_one() -> None:
    """On the mean over a node of each stage: one alone is a matter of luck."""
    smaller = [without_node(PROBLEM, PLAN, stage.nodes[0]) for stage in PLAN.stages]
    fresh = [solve(problem, SolveOptions(max_evaluations=8000)) for problem in smaller]
    quick = [replan(PLAN, problem, SolveOptions(max_evaluations=2000)) for problem in smaller]
    assert _mean_s(quick) < 1.1 * _mean_s(fresh)


def _mean_s(plans: Sequence[Plan]) -> float:
    return fmean(plan.predicted.iteration_s for plan in plans)


def test_only_replica_of_a_stage_is_replaced() -> None:
    problem = make_problem(1, [3, 1, 1], 2, 6)
    plan = solve(problem, SolveOptions(max_evaluations=500))
    lost = plan.stages[1].nodes[0]
    smaller = without_node(problem, plan, lost)
    assert smaller.sizes == (2, 1, 1)
    validate(replan(plan, smaller, SolveOptions(max_evaluations=200)))


def test_same_problem_gives_nothing_worse() -> None:
    again = replan(PLAN, PROBLEM, SolveOptions(max_evaluations=1))
    assert again.predicted.iteration_s <= PLAN.predicted.iteration_s + 1e-9


def test_slower_node_gets_less_to_do() -> None:
    node = max(PLAN.nodes, key=lambda name: sum(name in route.route for route in PLAN.microbatches))
    before = sum(node in route.route for route in PLAN.microbatches)
    found = replan(PLAN, slower(PROBLEM, node, 6.0), SolveOptions(max_evaluations=4000))
    validate(found)
    assert sum(node in route.route for route in found.microbatches) < before


def test_a_plan_that_relays_gives_one_whose_messages_go_direct() -> None:
    fuller = solve(make_problem(5, [3, 2, 2, 2], 4, 12), SolveOptions(max_evaluations=50))
    kept = [{PLAN.stage_of[node] for node in microbatch.route} for microbatch in PLAN.microbatches]
    relayed = with_relays(fuller, kept, PROBLEM.rules)
    assert any(microbatch.relays for microbatch in relayed.microbatches)
    for problem in (PROBLEM, without_node(PROBLEM, relayed, PROBLEM.nodes[0])):
        found = replan(relayed, problem, SolveOptions(max_evaluations=1))
        validate(found)
        assert all(microbatch.path is None for microbatch in found.microbatches)


def test_other_rules_begin_anew() -> None:
    longer = make_problem(5, [3, 2, 2, 2], 4, 12, fixed=False)
    found = replan(PLAN, longer, SolveOptions(max_evaluations=200))
    validate(found)
    assert {len(microbatch.route) for microbatch in found.microbatches} == {4}


def test_fewer_nodes_than_stages_are_not_enough() -> None:
    problem = make_problem(0, [1, 1, 1], 2, 3)
    plan = solve(problem, SolveOptions(max_evaluations=10))
    with pytest.raises(InfeasibleError, match="without node 'node-1' 2 nodes are left for 3 stages; add a node or"):
        without_node(problem, plan, "node-1")
