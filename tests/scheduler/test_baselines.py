import pytest
from small_problems import make_problem

from skippipe_scheduler.baselines.full_and_blind import MAX_SIZE_VARIANTS, full_pipeline_problem, network_blind
from skippipe_scheduler.bounds import lower_bounds
from skippipe_scheduler.errors import InfeasibleError
from skippipe_scheduler.plan.simulate import simulate
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.solver.plan_request import PlanRequest
from skippipe_scheduler.solver.planner import solve_with_baselines
from skippipe_scheduler.solver.solve import SolveOptions, solve, solve_full_pipeline, solve_network_blind

QUICK = SolveOptions(max_evaluations=150)


def test_full_pipeline_visits_every_stage_in_order() -> None:
    plan = solve_full_pipeline(make_problem(0, [2, 1, 2], 2, 5), QUICK)
    validate(plan)
    assert plan.visits == (5, 5, 5)
    assert all([plan.stage_of[node] for node in microbatch.route] == [0, 1, 2] for microbatch in plan.microbatches)


def test_full_pipeline_considers_every_even_distribution_of_nodes() -> None:
    variants = full_pipeline_problem(make_problem(0, [2, 1, 2], 2, 5))
    assert {problem.stage_sizes for problem in variants} == {(2, 2, 1), (2, 1, 2), (1, 2, 2)}
    assert all(problem.num_microbatches == 5 for problem in variants)


def test_the_number_of_distributions_is_bounded() -> None:
    variants = full_pipeline_problem(make_problem(0, [4, 1, 1, 1, 1, 1, 1, 1], 4, 4))
    assert 1 < len(variants) <= MAX_SIZE_VARIANTS


def test_full_pipeline_needs_a_node_per_stage() -> None:
    problem = make_problem(0, [1, 1, 1], 2, 2)
    short = problem.model_copy(update={"nodes": problem.nodes[:2]})
    with pytest.raises(InfeasibleError, match="needs 3 nodes; there are 2"):
        full_pipeline_problem(short)


def test_blind_costs_tell_nothing_apart_but_stage_and_rules_remain() -> None:
    problem = make_problem(0, [2, 1, 2], 2, 4)
    blind = network_blind(problem)
    assert len(set(blind.costs.forward_s.values())) == 1
    assert len({s for row in blind.costs.transfer_s.values() for s in row.values()}) == 1
    assert (blind.rules, blind.stages, blind.costs.memory) == (
        problem.rules,
        problem.stages,
        problem.costs.memory,
    )


def test_blind_plan_is_timed_with_the_true_costs_on_the_given_placement() -> None:
    problem = make_problem(0, [2, 2, 2], 2, 8, fixed=False)
    plan = solve(problem, QUICK)
    stages = [stage.nodes for stage in plan.stages]
    blind = solve_network_blind(problem, QUICK, stages)
    validate(blind)
    assert [stage.nodes for stage in blind.stages] == stages
    assert blind.costs == plan.costs
    assert simulate(blind).iteration_s == blind.predicted.iteration_s


def test_the_bound_of_a_blind_plan_is_that_of_the_problem_not_of_its_placement() -> None:
    problem = make_problem(0, [2, 2, 2], 2, 8, fixed=False)
    bound_s = max(lower_bounds(problem, 0.0).values())
    worst = [problem.nodes[:2], problem.nodes[2:4], problem.nodes[4:]]
    assert max(lower_bounds(make_problem(0, [2, 2, 2], 2, 8), 0.0).values()) > 1.01 * bound_s
    assert solve_network_blind(problem, QUICK, worst).predicted.lower_bound_s == bound_s
    result = solve_with_baselines(PlanRequest(problem, QUICK))
    assert result.network_blind.predicted.lower_bound_s == result.plan.predicted.lower_bound_s


def test_knowing_the_network_pays() -> None:
    problem = make_problem(2, [2, 2, 2], 2, 8)
    options = SolveOptions(max_evaluations=400)
    assert solve(problem, options).predicted.iteration_s < solve_network_blind(problem, options).predicted.iteration_s
