import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from crowding import at_most_s
from hypothesis import given, settings, strategies as st
from independent_checker import first_offence_of
from small_problems import make_problem, problems, slot_costs

from skippipe_scheduler.baselines.paper_method import solve_paper_method
from skippipe_scheduler.errors import InfeasibleError, InputError, ProblemError
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.simulate import simulate
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.slots.slot_model import SlotCosts, SlotModel
from skippipe_scheduler.solver.solve import SolveOptions, solve


@settings(max_examples=12, derandomize=True)
@given(problems(), st.integers(0, 3))
def test_plans_of_random_problems_are_valid(problem: Problem, seed: int) -> None:
    plan = solve(problem, SolveOptions(seed=seed, max_evaluations=60))
    validate(plan)
    assert simulate(plan).iteration_s == plan.predicted.iteration_s
    for visits, (least, most) in zip(plan.visits, problem.rules.coverage(problem.num_microbatches), strict=True):
        assert least <= visits <= most


def test_many_stages_have_a_plan() -> None:
    problem = make_problem(0, [1] * 40, 30, 4, swaps=1)
    validate(solve(problem, SolveOptions(max_evaluations=1)))


@pytest.mark.parametrize(
    "solver",
    [
        lambda problem: solve(problem, SolveOptions(max_evaluations=300)),
        lambda problem: solve_paper_method(problem, max_generations=20),
    ],
)
@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("protected", [(4,), (1, 4)])
def test_every_route_visits_the_protected_stages(
    solver: Callable[..., Plan], fixed: bool, protected: tuple[int, ...]
) -> None:
    problem = make_problem(3, [3, 1, 2, 2, 3], 4, 12, fixed=fixed, memory=3, protected=protected)
    plan = solver(problem)
    assert first_offence_of(json.loads(plan.model_dump_json())) is None
    others = [visits for stage, visits in enumerate(plan.visits) if stage not in (0, *protected)]
    assert [plan.visits[stage] for stage in (0, *protected)] == [12] * (1 + len(protected))
    assert others == [12 * (3 - len(protected)) // len(others)] * len(others)


def best_by_enumeration_s(problem: Problem) -> float:
    """Try all routes and all orders in which two microbatches' tasks can alternate."""
    slot_model = SlotModel(problem)
    costs = slot_costs(problem)
    every = [
        route
        for sequence in slot_model.sequences
        for route in itertools.product(*(slot_model.slots_of[stage] for stage in sequence))
    ]
    by_origin = [[route for route in every if route[0] == origin] for origin in slot_model.origins]
    pairs = [pair for pair in itertools.product(*by_origin) if slot_model.covers(pair)]
    return min(_best_order_s(costs, pair) for pair in pairs)


def _best_order_s(costs: SlotCosts, pair: Any) -> float:
    chains = [costs.chain(route) for route in pair]
    tasks = [len(chain.slots) for chain in chains]
    best_s = float("inf")
    for firsts in itertools.combinations(range(sum(tasks)), tasks[0]):
        turns = set(firsts)
        free: dict[int, float] = {}
        held: dict[int, int] = {}
        ready, step = [0.0, 0.0], [0, 0]
        for turn in range(sum(tasks)):
            microbatch = 0 if turn in turns else 1
            index, chain = step[microbatch], chains[microbatch]
            slot = chain.slots[index]
            length = len(pair[microbatch])
            if index < length:
                held[slot] = held.get(slot, 0) + 1
                if held[slot] > costs.memory[slot]:
                    break
            start_s = max(free.get(slot, 0.0), ready[microbatch])
            end_s = start_s + chain.durations_s[index]
            free[slot] = end_s + costs.overhead_s
            ready[microbatch] = end_s + chain.delays_s[index]
            step[microbatch] += 1
            held[slot] = held[slot] - (index > length)
            if ready[microbatch] >= best_s:
                break
        else:
            best_s = min(best_s, max(ready))
    return best_s


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("sizes", "memory"), [((1, 2, 2), 1), ((2, 1, 1), 2), ((1, 1, 1), 2)])
def test_tiny_problems_are_solved_to_the_optimum(seed: int, sizes: tuple[int, ...], memory: int) -> None:
    problem = make_problem(seed, sizes, 2, 2, memory=memory)
    plan = solve(problem, SolveOptions(seed=seed, max_evaluations=3000))
    optimum_s = best_by_enumeration_s(problem)
    assert plan.predicted.iteration_s == pytest.approx(optimum_s)
    assert plan.predicted.lower_bound_s == pytest.approx(optimum_s, rel=1e-3)


@pytest.mark.parametrize("fixed", [True, False])
def test_same_seed_and_evaluations_give_the_same_plan(fixed: bool) -> None:
    problem = make_problem(1, [2, 2, 2], 2, 6, fixed=fixed)
    options = SolveOptions(seed=4, max_evaluations=200)
    assert solve(problem, options).to_json() == solve(problem, options).to_json()


def test_the_time_limit_is_kept() -> None:
    problem = make_problem(1, [2, 1, 1, 1, 1, 1], 4, 12, memory=4, fixed=False)
    begin_s = time.perf_counter()
    plan = solve(problem, SolveOptions(time_limit_s=3.0, num_workers=1))
    assert time.perf_counter() - begin_s < at_most_s(3.5)
    validate(plan)


def test_more_search_is_better_than_none() -> None:
    problem = make_problem(6, [3, 2, 2, 2], 3, 12, fixed=False)
    none, some = (solve(problem, SolveOptions(max_evaluations=n)).predicted.iteration_s for n in (1, 600))
    assert some < none


def test_task_times_follow_the_layers_of_the_stage_a_node_holds() -> None:
    problem = make_problem(0, [1, 1, 1], 2, 3).model_copy(update={"stage_layers": (1, 4, 1)})
    plan = solve(problem, SolveOptions(max_evaluations=20))
    assert [stage.layers for stage in plan.stages] == [(0, 1), (1, 5), (5, 6)]
    heavy = plan.stages[1].nodes[0]
    assert plan.costs.forward_s[heavy] == pytest.approx(2 * problem.costs.forward_s[heavy])


def test_given_layers_are_written_down_and_checked() -> None:
    problem = make_problem(0, [1, 1, 1], 2, 3)
    options = SolveOptions(max_evaluations=20)
    assert solve(problem, options, layers=[2, 3, 2]).num_layers == 7
    with pytest.raises(ProblemError, match="3 stages"):
        solve(problem, options, layers=[2, 3])


def test_shared_links_are_timed_by_the_simulator() -> None:
    problem = make_problem(0, [2, 1, 1], 2, 4)
    rows = problem.costs.transfer_s
    shared = problem.costs.model_copy(
        update={
            "contention": "link",
            "activation_bytes": 10**8,
            "latency_s": {a: dict.fromkeys(row, 0.01) for a, row in rows.items()},
            "gbit_per_s": {a: {b: 0.8 / max(1e-3, s - 0.01) for b, s in row.items()} for a, row in rows.items()},
        }
    )
    plan = solve(problem.model_copy(update={"costs": shared}), SolveOptions(max_evaluations=50))
    validate(plan)
    assert plan.predicted.iteration_s == simulate(plan).iteration_s


def test_progress_reports_only_improvements() -> None:
    seen = []
    problem = make_problem(6, [3, 2, 2, 2], 3, 12)
    solve(problem, SolveOptions(max_evaluations=300, progress=lambda progress: seen.append(progress.iteration_s)))
    assert seen
    assert seen == sorted(set(seen), reverse=True)


@pytest.mark.parametrize("limit_s", [-1, float("nan"), "3"])
def test_a_limit_that_is_no_time_is_refused(limit_s: Any) -> None:
    with pytest.raises(InputError, match=r"time_limit_s: .*give a number of seconds"):
        SolveOptions(time_limit_s=limit_s)


def test_rules_that_no_route_can_obey_are_named() -> None:
    problem = make_problem(0, [1, 1, 1, 1, 1], 2, 4, jump=1, swaps=0)
    with pytest.raises(InfeasibleError, match=r"uniform_coverage, .*max_forward_jump 1 .* cannot be met together"):
        solve(problem, SolveOptions(max_evaluations=5))
