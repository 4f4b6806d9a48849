import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_problems import make_problem, problems

from skippipe_scheduler.bounds import lower_bounds
from skippipe_scheduler.solve import SolveOptions, solve


@settings(max_examples=30, deadline=None, derandomize=True)
@given(problems(), st.integers(0, 3))
def test_no_bound_exceeds_the_time_of_a_plan(problem, seed):
    plan = solve(problem, SolveOptions(seed=seed, max_evaluations=60))
    for name, bound_s in lower_bounds(problem).items():
        assert bound_s <= plan.predicted.iteration_s + 1e-9, name
    assert plan.predicted.lower_bound_s <= plan.predicted.iteration_s


def test_a_single_microbatch_meets_the_round_trip_bound():
    problem = make_problem(0, [1, 2, 2], 3, 1, swaps=1)
    plan = solve(problem, SolveOptions(max_evaluations=100))
    assert lower_bounds(problem)["round trip"] == pytest.approx(plan.predicted.iteration_s)


def test_waves_count_an_origins_memory():
    one, two = (make_problem(0, [1, 1], 2, 4, memory=memory) for memory in (1, 2))
    assert lower_bounds(one)["origin waves"] > 1.9 * lower_bounds(two)["origin waves"]


def test_freeing_the_placement_never_raises_a_bound():
    fixed = lower_bounds(make_problem(5, [2, 1, 2], 2, 6))
    free = lower_bounds(make_problem(5, [2, 1, 2], 2, 6, fixed=False))
    assert all(free[name] <= fixed[name] + 1e-9 for name in fixed)


def test_work_of_a_stage_is_shared_by_its_replicas():
    one = lower_bounds(make_problem(0, [1, 1], 2, 12, memory=9))["node work"]
    many = lower_bounds(make_problem(0, [3, 3], 2, 12, memory=9))["node work"]
    assert one > 2 * many
