"""What the bounds must be together: never more than any plan takes, and as much as they can be where that is known."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from crowding import at_most_s
from hypothesis import given, settings, strategies as st
from random_plans import random_plan
from small_problems import make_problem, problems, share_links

from skippipe_scheduler.bounds import explain_bound, lower_bounds
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.problem.costs import Costs
from skippipe_scheduler.problem.problem import AutoMicrobatches, EvenMicrobatches, Problem, StageNodes
from skippipe_scheduler.problem.rules import Rules, coverage_offence
from skippipe_scheduler.problem.sharing.contention import Contention
from skippipe_scheduler.solver.solve import SolveOptions, solve


def assert_no_bound_exceeds(bounds: Mapping[str, float], iteration_s: float) -> None:
    for name, bound_s in bounds.items():
        assert bound_s <= iteration_s + 1e-9, name


@settings(max_examples=12, derandomize=True)
@given(problems(), st.integers(0, 3))
def test_no_bound_exceeds_the_time_of_a_plan(problem: Problem, seed: int) -> None:
    plan = solve(problem, SolveOptions(seed=seed, max_evaluations=200))
    assert_no_bound_exceeds(lower_bounds(problem), plan.predicted.iteration_s)
    assert plan.predicted.lower_bound_s <= plan.predicted.iteration_s


def change_rules(problem: Problem, **update: Any) -> Problem:
    return problem.model_copy(update={"rules": problem.rules.model_copy(update=update)})


VARIANTS: dict[str, Callable[[Problem], Problem]] = {
    "shared links": lambda problem: share_links(problem, "link"),
    "shared cards": lambda problem: share_links(problem, "node"),
    "mixed lengths": lambda problem: change_rules(
        problem, route_length=3, route_lengths={3: 1, 2: 1}, protected_stages=problem.rules.protected_stages[:1]
    ),
    "free origin counts": lambda problem: problem.model_copy(
        update={"microbatches_per_origin": AutoMicrobatches(auto=problem.num_microbatches)}
    ),
    "uneven layers": lambda problem: problem.model_copy(
        update={"stage_layers": tuple(range(1, problem.num_stages + 1))}
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=6, derandomize=True)
@given(problem=problems())
def test_no_bound_exceeds_the_time_of_a_plan_of_a_variant(variant: str, problem: Problem) -> None:
    changed = VARIANTS[variant](problem)
    plan = solve(changed, SolveOptions(max_evaluations=200))
    assert_no_bound_exceeds(lower_bounds(changed), plan.predicted.iteration_s)


def problem_of_plan(plan: Plan, *, fixed: bool) -> Problem:
    """Return a problem of which the plan is a solution."""
    return Problem(
        nodes=plan.nodes,
        stages=tuple(StageNodes(nodes=stage.nodes) for stage in plan.stages) if fixed else None,
        stage_sizes=None if fixed else tuple(len(stage.nodes) for stage in plan.stages),
        microbatches_per_origin=AutoMicrobatches(auto=len(plan.microbatches)),
        costs=plan.costs,
        rules=plan.rules.model_copy(update={"uniform_coverage": coverage_offence(plan.visits, plan.rules) is None}),
    )


@settings(max_examples=30, derandomize=True)
@given(st.integers(0, 10_000), st.sampled_from(["none", "link", "node", "shared"]), st.booleans(), st.integers(1, 3))
def test_no_bound_exceeds_the_time_of_a_random_plan(
    seed: int, contention: Contention, fixed: bool, memory: int
) -> None:
    plan = random_plan(seed, num_microbatches=3, contention=contention, memory=memory)
    bounds = lower_bounds(problem_of_plan(plan, fixed=fixed), 0.5)
    assert_no_bound_exceeds(bounds, plan.predicted.iteration_s)


def test_a_single_microbatch_meets_the_round_trip_bound() -> None:
    problem = make_problem(0, [1, 2, 2], 3, 1, swaps=1)
    plan = solve(problem, SolveOptions(max_evaluations=100))
    assert lower_bounds(problem)["round trip"] == pytest.approx(plan.predicted.iteration_s)


def test_waves_count_an_origins_memory() -> None:
    narrow, wide = (make_problem(0, [1, 1], 2, 4, memory=memory) for memory in (1, 2))
    assert lower_bounds(narrow)["origin waves"] > 1.7 * lower_bounds(wide)["origin waves"]


@pytest.mark.parametrize("memory", [1, 2, 3])
def test_the_schedule_of_a_lone_origin_can_be_met(memory: int) -> None:
    """With a replica for each microbatch, only the origin stands in the way."""
    problem = make_problem(1, [1, 6], 2, 6, memory=memory, uniform=False)
    near = problem.costs.model_copy(
        update={
            "transfer_s": {a: dict.fromkeys(row, 1.0) for a, row in problem.costs.transfer_s.items()},
            "forward_s": dict.fromkeys(problem.nodes, 0.5),
            "backward_s": dict.fromkeys(problem.nodes, 0.9),
        }
    )
    alike = problem.model_copy(update={"costs": near})
    plan = solve(alike, SolveOptions(max_evaluations=20_000))
    assert lower_bounds(alike)["origin schedule"] == pytest.approx(plan.predicted.iteration_s, rel=1e-3)


def test_origins_compete_for_a_shared_replica() -> None:
    """Two origins with much memory, one replica that holds one microbatch at a time."""
    problem = make_problem(2, [2, 1], 2, 6, memory=6)
    narrow = problem.costs.memory | {problem.nodes[2]: 1}
    problem = problem.model_copy(update={"costs": problem.costs.model_copy(update={"memory": narrow})})
    bounds = lower_bounds(problem)
    plan = solve(problem, SolveOptions(max_evaluations=5000))
    assert bounds["route program"] > 1.2 * bounds["origin schedule"]
    assert bounds["route program"] > 0.9 * plan.predicted.iteration_s


def test_freeing_the_placement_never_raises_a_bound() -> None:
    fixed = lower_bounds(make_problem(5, [2, 1, 2], 2, 6))
    free = lower_bounds(make_problem(5, [2, 1, 2], 2, 6, fixed=False))
    assert max(free.values()) <= max(fixed.values()) + 1e-9


@pytest.mark.parametrize("memory", [1, 2])
def test_origins_that_divide_freely_need_no_longer(memory: int) -> None:
    even = make_problem(7, [3, 3], 2, 9, memory=memory)
    free = lower_bounds(VARIANTS["free origin counts"](even))
    assert max(free.values()) <= max(lower_bounds(even).values()) + 1e-9
    assert free["origin schedule"] >= free["origin waves"] > free["round trip"]


def test_origins_of_a_free_placement_are_chosen_one_by_one() -> None:
    """Two pairs of near nodes: the origins cannot both be near the only replica that is left near them."""
    problem = make_problem(8, [2, 2], 2, 8, memory=2, fixed=False)
    side = dict(zip(problem.nodes, [0, 0, 0, 1], strict=True))
    rows = {a: {b: 0.2 if side[a] == side[b] else 9.0 for b in row} for a, row in problem.costs.transfer_s.items()}
    problem = problem.model_copy(update={"costs": problem.costs.model_copy(update={"transfer_s": rows})})
    bounds = lower_bounds(problem)
    plan = solve(problem, SolveOptions(max_evaluations=3000))
    assert bounds["route program"] > 1.05 * bounds["origin schedule"]
    assert bounds["route program"] <= plan.predicted.iteration_s


def test_origins_are_on_no_route_of_each_other() -> None:
    """Windows of memory and work alone prove 15.9 s here: there the origins' microbatches pass through each other."""
    problem = make_problem(24, [2, 2, 2], 3, 8, memory=3, fixed=False)
    plan = solve(problem, SolveOptions(max_evaluations=3000))
    assert 17.5 < lower_bounds(problem, 20.0)["route program"] <= plan.predicted.iteration_s


def test_work_of_a_stage_is_shared_by_its_replicas() -> None:
    single = lower_bounds(make_problem(0, [1, 1], 2, 12, memory=9))["node work"]
    many = lower_bounds(make_problem(0, [3, 3], 2, 12, memory=9))["node work"]
    assert single > 2 * many


def test_bounds_take_no_longer_than_their_budget() -> None:
    problem = make_problem(3, [8] * 8, 6, 160, fixed=True)
    begin_s = time.perf_counter()
    cheap = lower_bounds(problem, 0.0)
    assert set(cheap) == {"node work", "round trip", "origin waves"}
    more = lower_bounds(problem, 0.5)
    assert time.perf_counter() - begin_s < at_most_s(4.0)
    assert max(more.values()) >= max(cheap.values())


def test_equal_problems_have_equal_bounds() -> None:
    problem = make_problem(4, [2, 2, 2], 3, 8)
    assert lower_bounds(problem, 20.0) == lower_bounds(problem, 20.0)


def test_an_explanation_names_the_origin_and_the_cure() -> None:
    problem = make_problem(0, [1, 2], 2, 6, memory=3)
    text = explain_bound(problem, {"node work": 1.0, "origin waves": 12.5})
    assert "Origin node-0" in text
    assert "2 waves" in text
    assert "memory for 6" in text


@pytest.mark.parametrize("fixed", [True, False])
def test_every_bound_has_an_explanation(fixed: bool) -> None:
    problem = make_problem(6, [2, 2, 2], 3, 8, fixed=fixed)
    for variant in (problem, VARIANTS["free origin counts"](problem)):
        bounds = lower_bounds(variant)
        texts = {name: explain_bound(variant, {name: bound_s}) for name, bound_s in bounds.items()}
        assert all(f"{bounds[name]:.3g} s" in text for name, text in texts.items())


def test_what_is_no_bound_is_not_explained() -> None:
    with pytest.raises(ValueError, match="'luck' is not one of node work, round trip"):
        explain_bound(make_problem(0, [1, 2], 2, 6), {"luck": 3.0})


def test_an_explanation_names_the_stage_whose_replicas_work_longest() -> None:
    problem = make_problem(0, [3, 1], 2, 12, memory=9)
    bounds = lower_bounds(problem)
    assert "Stage 1" in explain_bound(problem, {"node work": bounds["node work"]})
    assert "memory" in explain_bound(problem, {"route program": 9.0})


def test_a_program_whose_solver_turns_in_circles_ends_in_time() -> None:
    """Four nodes that are alike: with so many equal routes the simplex method need not come to an end."""
    names = tuple(f"node-{index}" for index in range(4))
    costs = Costs(
        forward_s=dict.fromkeys(names, 0.0023134208),
        backward_s=dict.fromkeys(names, 0.0046268416),
        loss_s=dict.fromkeys(names, 0.0012632064),
        transfer_s={a: {b: 0.0000631072 for b in names if b != a} for a in names},
        memory=dict.fromkeys(names, 4),
    )
    problem = Problem(
        nodes=names,
        stage_sizes=(1, 2, 1),
        stage_layers=(2, 1, 3),
        microbatches_per_origin=EvenMicrobatches(even=4),
        costs=costs,
        rules=Rules(num_stages=3, route_length=3, max_swaps=0),
    )
    begin_s = time.perf_counter()
    bounds = lower_bounds(problem, 0.3)
    assert time.perf_counter() - begin_s < 5.0
    assert 0 < max(bounds.values()) <= solve(problem, SolveOptions(max_evaluations=100)).predicted.iteration_s
