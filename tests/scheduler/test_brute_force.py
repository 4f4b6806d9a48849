"""Tiny problems against their optimum: the planner finds it, and no bound is above it."""

import pytest
from brute_force import optimum_s
from hypothesis import given, settings, strategies as st
from random_plans import random_plan
from small_problems import alike, make_problem, share_links
from test_bounds import problem_of_plan
from test_solve import best_by_enumeration_s

from skippipe_scheduler.bounds import lower_bounds
from skippipe_scheduler.bounds.network import Network
from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.solver.solve import SolveOptions, solve

SIZES = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)]


@st.composite
def tiny_problems(draw: st.DrawFn) -> Problem:
    sizes = draw(st.sampled_from(SIZES))
    problem = make_problem(
        draw(st.integers(0, 1000)),
        sizes,
        draw(st.integers(2, len(sizes))),
        draw(st.integers(1, 3)),
        memory=draw(st.integers(1, 2)),
        fixed=draw(st.booleans()),
        uniform=draw(st.booleans()),
        overhead_s=draw(st.sampled_from([0.0, 0.13])),
        reduce_s=draw(st.sampled_from([None, 3.0])),
    )
    return share_links(problem, draw(st.sampled_from(["none", "link", "node"])))


@settings(max_examples=30, derandomize=True)
@given(tiny_problems())
def test_the_planner_finds_the_optimum(problem: Problem) -> None:
    plan = solve(problem, SolveOptions(max_evaluations=6000))
    least_s = optimum_s(problem)
    assert plan.predicted.iteration_s == pytest.approx(least_s, rel=1e-9)


@settings(max_examples=30, derandomize=True)
@given(tiny_problems())
def test_no_bound_is_above_the_optimum(problem: Problem) -> None:
    least_s = optimum_s(problem)
    for budget_s in (0.0, 2.0):
        for name, bound_s in lower_bounds(problem, budget_s).items():
            assert bound_s <= least_s * (1 + 1e-9), (name, budget_s)
    predicted = solve(problem, SolveOptions(max_evaluations=300)).predicted
    assert predicted.lower_bound_s <= least_s * (1 + 1e-9) <= predicted.iteration_s * (1 + 2e-9)
    if predicted.lower_bound_s == predicted.iteration_s:  # a gap of 0 is a proof
        assert predicted.iteration_s == pytest.approx(least_s, rel=1e-9)


@settings(max_examples=20, derandomize=True)
@given(st.integers(0, 1000), st.sampled_from([(1, 1), (2, 1), (2, 2), (2, 1, 1)]), st.integers(1, 4), st.integers(1, 2))
def test_no_bound_of_nodes_that_are_alike_is_above_the_optimum(
    seed: int, sizes: tuple[int, ...], microbatches: int, memory: int
) -> None:
    problem = alike(make_problem(seed, sizes, len(sizes), microbatches, memory=memory, fixed=False))
    assert len(set(Network(problem).alike)) <= 2
    least_s = optimum_s(problem)
    for name, bound_s in lower_bounds(problem).items():
        assert bound_s <= least_s * (1 + 1e-9), name


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("sizes", "memory"), [((1, 2, 2), 1), ((2, 1), 1), ((2, 1, 1), 2), ((1, 1, 1), 2)])
def test_two_microbatches_agree_with_all_interleavings(seed: int, sizes: tuple[int, ...], memory: int) -> None:
    problem = make_problem(seed, sizes, 2, 2, memory=memory)
    assert optimum_s(problem) == pytest.approx(best_by_enumeration_s(problem), rel=1e-12)


@settings(max_examples=20, derandomize=True)
@given(st.integers(0, 10_000), st.sampled_from(["none", "link", "node"]), st.integers(1, 2))
def test_no_random_plan_beats_the_optimum(seed: int, contention: str, memory: int) -> None:
    plan = random_plan(
        seed,
        num_nodes=4,
        num_stages=3,
        route_length=2,
        num_microbatches=3,
        memory=memory,
        contention=contention,  # type: ignore[arg-type]
    )
    least_s = optimum_s(problem_of_plan(plan, fixed=True))
    assert least_s <= plan.predicted.iteration_s * (1 + 1e-9)


def test_a_known_time_is_beaten_or_returned() -> None:
    problem = make_problem(0, [1, 1, 1], 3, 2)
    least_s = optimum_s(problem)
    assert optimum_s(problem, 2 * least_s) == least_s
    assert optimum_s(problem, 0.5 * least_s) == 0.5 * least_s
