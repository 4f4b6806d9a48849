"""What is asked of the planner: what a request leaves open, and which plans are what it asks for."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from small_problems import make_problem
from test_build import GIB
from test_layers import LIGHT, cluster_of, open_problem

from skippipe_scheduler.baselines.full_and_blind import full_pipeline_problem
from skippipe_scheduler.errors import ProblemError
from skippipe_scheduler.options import SolveOptions
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.simulate import peak_held
from skippipe_scheduler.problem.problem import EvenMicrobatches, Problem, StageNodes
from skippipe_scheduler.problem.rules import RouteLimits, Rules, skip_rules
from skippipe_scheduler.problem.stage_sizes import size_variants
from skippipe_scheduler.solver.other_routes import other_routes_request
from skippipe_scheduler.solver.plan_request import PlanRequest
from skippipe_scheduler.solver.planner import solve_request, solve_with_baselines
from skippipe_scheduler.solver.solve import solve, solve_variants

QUICK = SolveOptions(max_evaluations=200)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(3, [2, 2, 2], 2, 4, fixed=False)


@pytest.fixture(scope="module")
def plan(problem: Problem) -> Plan:
    return solve(problem, QUICK)


def test_a_request_without_choices_is_one_solve(problem: Problem, plan: Plan) -> None:
    assert solve_request(PlanRequest(problem, QUICK)) == plan


def test_who_chooses_the_sizes_decides_what_is_raced(problem: Problem) -> None:
    full = problem.model_copy(update={"rules": skip_rules(3, max_swaps=0, max_swap_distance=0)})
    for source in ("given", "rule", "auto"):
        request = PlanRequest(problem, stage_size_source=source)
        sizes_by_memory = source == "auto"
        assert request.full_pipelines(problem) == full_pipeline_problem(problem, sizes_by_memory=sizes_by_memory)
        assert request.variants(problem) == (size_variants(problem) if source == "auto" else [problem])
        assert request.variants(full) == ([full] if source == "given" else request.full_pipelines(full))
    placed = problem.model_copy(update={"stages": _stages(problem), "stage_sizes": None})
    assert PlanRequest(placed, stage_size_source="auto").variants(placed) == [placed]


def test_sizes_that_are_open_are_those_of_the_plan(problem: Problem) -> None:
    request = PlanRequest(problem, QUICK, stage_size_source="auto")
    found = solve_request(request)
    assert found == solve_variants(size_variants(problem), QUICK)
    assert request.resolve(found).sizes == tuple(len(stage.nodes) for stage in found.stages)
    assert request.difference_from(found) is None


def _stages(problem: Problem) -> tuple[StageNodes, ...]:
    nodes = iter(problem.nodes)
    return tuple(StageNodes(nodes=tuple(next(nodes) for _ in range(size))) for size in problem.sizes)


def _with_costs(problem: Problem, **changes: object) -> Problem:
    return problem.model_copy(update={"costs": problem.costs.model_copy(update=changes)})


CHANGES: dict[str, Callable[[Problem, Plan], Problem]] = {
    "nodes": lambda problem, plan: problem.model_copy(update={"nodes": problem.nodes[::-1]}),
    "rules": lambda problem, plan: problem.model_copy(
        update={"rules": problem.rules.model_copy(update={"max_swaps": 7})}
    ),
    "microbatches": lambda problem, plan: problem.model_copy(
        update={"microbatches_per_origin": EvenMicrobatches(even=problem.num_microbatches + 1)}
    ),
    "layers": lambda problem, plan: problem.model_copy(update={"stage_layers": (1, 2, 3)}),
    "placement": lambda problem, plan: problem.model_copy(
        update={"stages": tuple(StageNodes(nodes=stage.nodes[::-1]) for stage in plan.stages), "stage_sizes": None}
    ),
    "pinned nodes": lambda problem, plan: problem.model_copy(
        update={"pinned": {plan.nodes[0]: (plan.stage_of[plan.nodes[0]] + 1) % 3}}
    ),
    "stage sizes": lambda problem, plan: problem.model_copy(update={"stage_sizes": (1, 2, 3)}),
    "links": lambda problem, plan: _with_costs(problem, transfer_s={}),
    "contention": lambda problem, plan: _with_costs(problem, contention="node"),
    "splits of backwards": lambda problem, plan: _with_costs(problem, weight_s=dict(problem.costs.forward_s)),
    "memory": lambda problem, plan: _with_costs(
        problem, memory={node: max(0, peak_held(tasks) - 1) for node, tasks in plan.order.items()}
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_plan_for_something_else_is_named(problem: Problem, plan: Plan, name: str) -> None:
    assert PlanRequest(problem).difference_from(plan) is None
    assert PlanRequest(CHANGES[name](problem, plan)).difference_from(plan) == name


CHANGED_COSTS: dict[str, Callable[[Problem, Plan], Problem]] = {
    "task times": lambda problem, plan: _with_costs(
        problem, forward_s={node: 2 * taken_s for node, taken_s in problem.costs.forward_s.items()}
    ),
    "memory": lambda problem, plan: _with_costs(
        problem, memory={node: held + 1 for node, held in problem.costs.memory.items()}
    ),
}


@pytest.mark.parametrize("name", CHANGED_COSTS)
def test_a_plan_that_could_only_be_slower_fits_and_is_named(problem: Problem, plan: Plan, name: str) -> None:
    assert PlanRequest(problem).other_costs_of(plan) is None
    request = PlanRequest(CHANGED_COSTS[name](problem, plan))
    assert request.difference_from(plan) is None
    assert request.other_costs_of(plan) == name


def test_what_is_open_makes_no_difference(problem: Problem, plan: Plan) -> None:
    other_sizes = problem.model_copy(update={"stage_sizes": (1, 2, 3)})
    for source in ("rule", "auto"):
        assert PlanRequest(other_sizes, stage_size_source=source).difference_from(plan) is None


def test_open_layers_are_those_of_the_plan_where_its_nodes_can_hold_them() -> None:
    cluster = cluster_of([1.0, 4.0, 4.0])
    request = PlanRequest(open_problem(cluster), QUICK)
    found = solve_request(request)
    assert request.difference_from(found) is None
    assert request.resolve(found).stage_layers == found.layers_per_stage
    longer = PlanRequest(open_problem(cluster, replace(LIGHT, num_layers=13)))
    assert longer.difference_from(found) == "layers"
    large = replace(LIGHT, layer_state_bytes=GIB, embedding_and_head_state_bytes=60 * GIB)
    assert PlanRequest(open_problem(cluster, large)).difference_from(found) == "memory"
    assert solve_request(replace(request, warm=found)).layers_per_stage == found.layers_per_stage


def test_routes_beside_a_plan_are_a_request_of_their_own(plan: Plan) -> None:
    rules = skip_rules(3, max_swaps=0, max_swap_distance=0)
    request = other_routes_request(plan, rules, QUICK)
    full = solve_request(request)
    assert (full.stages, full.costs, full.rules) == (plan.stages, plan.costs, rules)
    assert request.difference_from(full) is None
    assert request.difference_from(plan) == "rules"
    assert replace(request, layers_per_stage=(2, 2, 2)).difference_from(full) == "layers"


def test_baselines_begin_from_what_the_request_leaves_open(problem: Problem) -> None:
    begun: list[str] = []
    result = solve_with_baselines(PlanRequest(problem, QUICK, stage_size_source="rule"), announce=begun.append)
    assert begun == ["this plan", "full pipeline", "network-blind skipping"]
    assert result.plan == solve(problem, QUICK)
    assert result.full_pipeline == solve_variants(full_pipeline_problem(problem), QUICK)
    assert result.network_blind.stages == result.plan.stages
    assert [*result.baselines.values()] == [result.full_pipeline, result.network_blind]


def test_rules_by_a_skip_ratio() -> None:
    assert {*RouteLimits.__annotations__} == {*Rules.model_fields} - {"num_stages", "route_length", "route_lengths"}
    assert skip_rules(4, 0.5) == Rules(num_stages=4, route_length=2)
    assert skip_rules(4, 0.9, route_lengths={4: 1, 2: 3}).lengths == (2, 4)  # the mix takes the ratio's place
    with pytest.raises(ProblemError, match=r"^protected_stages has stage 4, stages are 0 to 3"):
        skip_rules(4, 0.5, protected_stages=(4,))
