"""The compiled search: its times are those of the simulator, its schedules obey all rules, its results repeat."""

import math
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crowding import at_most_s
from hypothesis import given, settings, strategies as st
from small_problems import make_problem, problems, share_links, slot_costs

from skippipe_scheduler.baselines.dispatch import dispatch_solution
from skippipe_scheduler.budget import Budget
from skippipe_scheduler.options import Robustness
from skippipe_scheduler.plan.plan import Plan, Solver
from skippipe_scheduler.plan.simulate import simulate
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.problem.problem import AutoMicrobatches, Problem
from skippipe_scheduler.search import local_search
from skippipe_scheduler.search.kernel.anneal import construct, insert_sequence
from skippipe_scheduler.search.kernel.arrays import START
from skippipe_scheduler.search.kernel.constants import LINK_COST, WORK_COST
from skippipe_scheduler.search.kernel.dispatching import ANY_NUMBER, dispatch
from skippipe_scheduler.search.kernel.timing import retime
from skippipe_scheduler.search.local_search import LocalSearch, load_chunks
from skippipe_scheduler.search.tuning import LOCAL_SEARCH
from skippipe_scheduler.slots.assemble import finished_plan
from skippipe_scheduler.slots.routes import balanced_routes
from skippipe_scheduler.slots.slot_model import SlotCosts, SlotModel
from skippipe_scheduler.slots.solution import Solution
from skippipe_scheduler.solver.solve import SolveOptions, solve

SOLVER = Solver(name="test", version="0", seed=0, time_limit_s=0.0, wall_s=0.0)
CONTENTIONS = st.sampled_from(["none", "link", "node", "shared"])


def begin(problem: Problem, seed: int = 0, robustness: Robustness | None = None) -> tuple[LocalSearch, Solution]:
    slot_model = SlotModel(problem)
    search = LocalSearch(slot_model, seed, robustness)
    placement = slot_model.given_placement() or tuple(range(len(problem.nodes)))
    return search, search.start(placement, balanced_routes(slot_model, seed))


def plan_of(search: LocalSearch, solution: Solution) -> Plan:
    return finished_plan(search.slot_model, solution, 0.0, SOLVER, None)


@settings(max_examples=60, derandomize=True)
@given(problems(), CONTENTIONS, st.integers(0, 5), st.integers(0, 400))
def test_every_schedule_is_valid_and_timed_exactly(problem: Problem, contention: str, seed: int, steps: int) -> None:
    search, solution = begin(share_links(problem, contention), seed)
    for found in (solution, search.improve(Budget(1.0, steps)) if steps else solution):
        plan = plan_of(search, found)
        validate(plan)
        assert found.iteration_s == pytest.approx(simulate(plan).iteration_s, rel=1e-9)


@settings(max_examples=60, derandomize=True)
@given(problems(), CONTENTIONS, st.integers(0, 5))
def test_a_dispatch_is_the_rule_among_shared_transfers(problem: Problem, contention: str, seed: int) -> None:
    """Timed anew in its own order it is the same, and where nothing is shared it is that of the rule."""
    problem = share_links(problem, contention)
    slot_model = SlotModel(problem)
    placement = slot_model.given_placement() or tuple(range(len(problem.nodes)))
    routes = balanced_routes(slot_model, seed)
    search = LocalSearch(slot_model, seed)
    search.start(placement, routes)
    schedule, costs = search.candidate, SlotCosts(slot_model, placement)
    schedule.routes[:] = search.begun_with
    if not dispatch(search.instance, schedule, search.queue, search.dispatching, ANY_NUMBER):
        assert problem.rules.max_swaps, "only swaps can make full nodes wait for each other"
        return
    found, rows = schedule.starts.copy(), [each.copy() for each in (schedule.times_s, schedule.tasks, schedule.counts)]
    assert retime(search.instance, schedule, search.queue, -1)
    assert schedule.starts == pytest.approx(found, rel=1e-9, abs=1e-9)
    assert schedule.times_s == pytest.approx(rows[0], rel=1e-9, abs=1e-9)
    assert (schedule.tasks == rows[1]).all()
    assert (schedule.counts == rows[2]).all()
    if contention == "none":
        starts = dispatch_solution(costs, routes, "loss_first").starts
        for row, expected in zip(found, starts, strict=True):
            assert row[: len(expected)] == pytest.approx(expected)


@settings(max_examples=30, derandomize=True)
@given(problems(), CONTENTIONS, st.integers(1, 300))
def test_changing_large_schedules_keeps_them_valid(problem: Problem, contention: str, steps: int) -> None:
    search, _ = begin(share_links(problem, contention))
    search.large = True
    found = search.improve(Budget(1.0, steps))
    plan = plan_of(search, found)
    validate(plan)
    assert found.iteration_s == pytest.approx(simulate(plan).iteration_s, rel=1e-9)


@settings(max_examples=20, derandomize=True)
@given(problems(), st.integers(100, 300))
def test_large_schedules_that_are_timed_with_jitter_stay_valid(problem: Problem, steps: int) -> None:
    search, _ = begin(problem, robustness=Robustness(sigma=0.3, samples=2))
    search.large = True
    validate(plan_of(search, search.improve(Budget(1.0, steps))))


def test_large_schedules_begin_alike_where_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    slot_model = SlotModel(make_problem(3, [6, 4, 4, 4, 4, 4], 4, 24, memory=3))
    placement, routes = slot_model.given_placement(), balanced_routes(slot_model, 0)
    assert placement is not None

    def begun(slowness: float, *, repeatable: bool) -> Solution:
        monkeypatch.setattr(local_search, "slowness", lambda: slowness)
        tuning = replace(LOCAL_SEARCH, large_tasks=1)
        return LocalSearch(slot_model, 0, None, tuning, repeatable=repeatable).start(placement, routes)

    expected = begun(1.0, repeatable=True)
    assert begun(50.0, repeatable=True) == expected
    assert begun(50.0, repeatable=False).iteration_s > expected.iteration_s


def test_many_microbatches_are_dispatched_alone_where_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Insertions of a thousand tasks take up to three minutes in plain Python, whatever the time limit."""
    few, many = (SlotModel(make_problem(3, [2, 2, 2], 2, count, memory=9)) for count in (20, 21))
    assert (few.num_tasks, many.num_tasks) == (100, 105)
    inserted: list[int] = []

    def count(*arguments: Any) -> bool:
        inserted.append(1)
        return construct(*arguments)

    monkeypatch.setattr(local_search, "slowness", lambda: 350.0)
    monkeypatch.setattr(local_search, "construct", count)
    for slot_model, is_inserted in ((few, True), (many, False)):
        inserted.clear()
        placement = slot_model.given_placement()
        assert placement is not None
        search = LocalSearch(slot_model, 0)
        begun = search.start(placement, balanced_routes(slot_model, 0))
        again = search.greedy_insert(begun, Budget(0.0))
        assert math.isfinite(begun.iteration_s + again.iteration_s)
        assert bool(inserted) == is_inserted


@settings(max_examples=30, derandomize=True)
@given(problems(), st.integers(1, 2000))
def test_lighter_loads_obey_the_rules(problem: Problem, steps: int) -> None:
    slot_model = SlotModel(problem)
    search = LocalSearch(slot_model, 1)
    placement = slot_model.given_placement() or tuple(range(len(problem.nodes)))
    lighter, routes = search.balance_loads(placement, balanced_routes(slot_model, 0), steps)
    assert sorted(lighter) == sorted(placement)
    validate(plan_of(search, search.start(lighter, routes)))


@given(st.integers(1, 10**6), st.floats(1e-6, 1e-3))
@settings(max_examples=20)
def test_chunks_of_steps_keep_to_the_clock(steps: int, step_s: float) -> None:
    limit_s, gone, done, begin_s = 0.02, 0.0, 0, time.perf_counter()
    for chunk, begin, end in load_chunks(steps, limit_s, LOCAL_SEARCH):
        assert gone <= begin < end <= 1
        gone, done = end, done + chunk
        time.sleep(chunk * step_s)
    assert done <= steps + 1
    assert gone == 1 or time.perf_counter() - begin_s >= limit_s
    assert time.perf_counter() - begin_s < at_most_s(0.5)


def test_one_microbatch_takes_its_round_trip() -> None:
    problem = make_problem(3, [1, 1, 1], 3, 1)
    _, solution = begin(problem)
    costs = problem.costs
    names = [problem.nodes[slot] for slot in solution.routes[0]]
    hops = list(zip(names, [*names[1:], names[0]], strict=True))
    trip_s = sum(costs.forward_s[name] + costs.backward_s[name] for name in names) + costs.loss_s[names[0]]
    trip_s += sum(costs.transfer_s[a][b] + costs.transfer_s[b][a] for a, b in hops)
    assert solution.iteration_s == pytest.approx(trip_s)


@settings(max_examples=30, derandomize=True)
@given(st.integers(0, 1000), st.lists(st.integers(1, 4), min_size=3, max_size=4))
def test_a_microbatch_alone_goes_through_the_cheapest_replicas(seed: int, sizes: list[int]) -> None:
    """Where these end later than those that it had, it stays with what it had."""
    problem = make_problem(seed, [1, *sizes], len(sizes), 1)
    search, _ = begin(problem)
    instance, schedule, sequence = search.instance, search.candidate, np.array([0])
    schedule.routes[:] = search.begun_with
    slots = slot_costs(problem)
    before = tuple(schedule.routes[0, : schedule.lengths[0]].tolist())
    stages = [int(instance.stage_of[slot]) for slot in before]
    ends_s, costs_s = {}, {}
    for route in product(*(search.slot_model.slots_of[stage] for stage in stages)):
        schedule.routes[0, : len(route)] = route
        assert construct(instance, schedule, search.work, search.queue, sequence, 0.0, False)
        ends_s[route] = schedule.starts[0, 2 * len(route)]
        links_s = sum(slots.both_ways_s(*ends) for ends in zip(route, [*route[1:], route[0]], strict=True))
        work_s = sum(slots.forward_s[slot] + slots.backward_s[slot] for slot in route)
        costs_s[route] = LINK_COST * links_s + WORK_COST * work_s
    schedule.routes[0, : len(before)] = before
    assert construct(instance, schedule, search.work, search.queue, sequence, 0.0, True)
    cheapest = min(costs_s, key=costs_s.__getitem__)
    expected = cheapest if ends_s[cheapest] <= ends_s[before] else before
    assert schedule.starts[0, 2 * len(stages)] == pytest.approx(ends_s[expected])
    assert costs_s[tuple(schedule.routes[0, : len(stages)].tolist())] == pytest.approx(costs_s[expected])


@settings(max_examples=40, derandomize=True)
@given(problems(), st.integers(0, 5), st.floats(0, 8))
def test_other_replicas_never_end_later_and_keep_the_stages(problem: Problem, seed: int, wait_s: float) -> None:
    search, _ = begin(problem, seed)
    instance, schedule, work = search.instance, search.candidate, search.work
    *others, last = range(len(schedule.routes))
    ends_s = []
    for rerouted in (False, True):
        schedule.routes[:] = search.begun_with
        stages = instance.stage_of[schedule.routes]
        assert construct(instance, schedule, work, search.queue, np.array(others, np.int64), wait_s, True)
        assert insert_sequence(instance, schedule, work, search.queue, np.array([last]), wait_s, rerouted)
        ends_s.append(work.chain_s[START, 2 * schedule.lengths[last]])
        assert (instance.stage_of[schedule.routes] == stages).all()
        assert (schedule.routes[:, 0] == search.begun_with[:, 0]).all()
    assert ends_s[1] <= ends_s[0]


def test_search_improves_and_repeats() -> None:
    problem = make_problem(6, [3, 2, 2, 2], 3, 12, fixed=False)
    (search, solution), (again, _) = begin(problem, 3), begin(problem, 3)
    found = search.improve(Budget(1.0, 3000))
    assert found.iteration_s < solution.iteration_s
    assert found == again.improve(Budget(1.0, 3000))


def test_resumed_schedule_is_the_same() -> None:
    problem = make_problem(6, [3, 2, 2, 2], 3, 12)
    search, _ = begin(problem)
    found = search.improve(Budget(1.0, 500))
    resumed = LocalSearch(search.slot_model, 9).resume(found)
    assert resumed.routes == found.routes
    assert resumed.iteration_s == pytest.approx(found.iteration_s)


def test_mixed_route_lengths_keep_their_counts() -> None:
    problem = make_problem(2, [2, 2, 2, 2], 4, 8)
    rules = problem.rules.model_copy(update={"route_lengths": {4: 1, 3: 1, 2: 2}})
    plan = solve(problem.model_copy(update={"rules": rules}), SolveOptions(max_evaluations=2000))
    validate(plan)
    assert Counter(len(microbatch.route) for microbatch in plan.microbatches) == {2: 4, 3: 2, 4: 2}


def test_free_origins_send_the_work_where_it_is_cheap() -> None:
    problem = make_problem(2, [2, 2, 2], 2, 8)
    slow = problem.stages[0].nodes[0] if problem.stages else ""
    costs = problem.costs.model_copy(update={"loss_s": {**problem.costs.loss_s, slow: 30.0}})
    even = problem.model_copy(update={"costs": costs})
    auto = even.model_copy(update={"microbatches_per_origin": AutoMicrobatches(auto=8)})
    fixed, free = (solve(posed, SolveOptions(max_evaluations=4000)) for posed in (even, auto))
    validate(free)
    assert sum(microbatch.route[0] == slow for microbatch in fixed.microbatches) == 4
    assert sum(microbatch.route[0] == slow for microbatch in free.microbatches) < 2
    assert free.predicted.iteration_s < 0.5 * fixed.predicted.iteration_s


def test_robust_score_is_the_mean_over_jitter() -> None:
    problem = make_problem(6, [3, 2, 2, 2], 3, 12)
    _, nominal = begin(problem)
    search, jittered = begin(problem, robustness=Robustness(sigma=0.6, samples=4))
    assert jittered.iteration_s > nominal.iteration_s
    found = search.improve(Budget(1.0, 300))
    validate(plan_of(search, found))
    assert found.iteration_s <= jittered.iteration_s


def test_plain_python_finds_what_compiled_code_finds() -> None:
    program = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from small_problems import make_problem\n"
        "from skippipe_scheduler.solver.solve import SolveOptions, solve\n"
        "problem = make_problem(1, [2, 2, 2], 2, 6, fixed=False)\n"
        "print(solve(problem, SolveOptions(seed=4, max_evaluations=150)).to_json())"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program, str(Path(__file__).parent)],
            env=os.environ | extra,
            capture_output=True,
            text=True,
            timeout=150,
            check=True,
        ).stdout
        for extra in ({}, {"NUMBA_DISABLE_JIT": "1"})
    ]
    assert outputs[0] == outputs[1]
