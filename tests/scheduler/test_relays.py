"""Plans whose messages go by way of nodes of the stages that a route leaves out."""

from collections.abc import Collection
from dataclasses import replace
from threading import Event
from time import perf_counter

import pytest
from hypothesis import given, settings, strategies as st
from random_plans import random_plan, with_relays
from small_problems import problems, share_links

from skippipe_scheduler.analysis.critical_path import critical_path
from skippipe_scheduler.analysis.explain import bottleneck
from skippipe_scheduler.baselines.full_and_blind import as_full_pipeline
from skippipe_scheduler.bounds import lower_bounds
from skippipe_scheduler.budget import Budget
from skippipe_scheduler.options import Robustness, SolveOptions
from skippipe_scheduler.plan.plan import Plan, Solver
from skippipe_scheduler.plan.recost import at_pace
from skippipe_scheduler.plan.simulate import simulate
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.problem.costs import Costs
from skippipe_scheduler.problem.problem import Problem, StageNodes
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.problem.sharing.contention import Contention
from skippipe_scheduler.search.local_search import LocalSearch
from skippipe_scheduler.slots.assemble import finished_plan
from skippipe_scheduler.slots.slot_model import SlotModel
from skippipe_scheduler.solver.leave_stages_out import schedule_with_relays
from skippipe_scheduler.solver.plan_request import PlanRequest
from skippipe_scheduler.solver.planner import solve_request, solve_with_baselines
from skippipe_scheduler.solver.relays import plan_with_relays, with_best_ways
from skippipe_scheduler.solver.solve import solve

CONTENTIONS = st.sampled_from(["none", "link", "node", "shared"])
SOLVER = Solver(name="test", version="0", seed=0, time_limit_s=0.0, wall_s=0.0)
QUICK = SolveOptions(max_evaluations=30)


def full_pipeline_of(problem: Problem) -> Plan:
    return solve(as_full_pipeline(problem), replace(QUICK, max_evaluations=5))


@settings(max_examples=20, derandomize=True)
@given(problems(), CONTENTIONS, st.integers(0, 5), st.sampled_from([0, 1, 200]), st.booleans())
def test_the_search_times_relays_exactly_and_keeps_all_rules(
    problem: Problem, contention: str, seed: int, steps: int, large: bool
) -> None:
    problem = share_links(problem, contention)
    full = full_pipeline_of(problem)
    start = schedule_with_relays(full, problem, seed)
    assert start is not None
    search = LocalSearch(SlotModel(as_full_pipeline(problem)), seed)
    search.large = large
    begun = search.resume(start)
    for found in (begun, search.improve(Budget(1.0, steps)) if steps else begun):
        plan = finished_plan(search.slot_model, found, 0.0, SOLVER, None)
        plan = plan.model_copy(update={"rules": problem.rules})
        validate(plan)
        assert found.iteration_s == pytest.approx(simulate(plan).iteration_s, rel=1e-9)
        assert found.key <= begun.key
        skips = problem.rules.route_length < problem.num_stages
        assert all(bool(microbatch.relays) == skips for microbatch in plan.microbatches)


@settings(max_examples=30, derandomize=True)
@given(problems(), st.integers(0, 5))
def test_before_any_search_all_stands_where_it_stood(problem: Problem, seed: int) -> None:
    """And where nothing is shared, nothing comes later than in the full pipeline."""
    full = full_pipeline_of(problem)
    start = schedule_with_relays(full, problem, seed)
    assert start is not None
    slot_model = SlotModel(as_full_pipeline(problem))
    found = finished_plan(slot_model, LocalSearch(slot_model, seed).resume(start), 0.0, SOLVER, None)
    for node, tasks in full.order.items():
        assert [(task.operation.removeprefix("R"), task.microbatch) for task in found.order[node]] == [*tasks]
    assert [microbatch.whole_path for microbatch in found.microbatches] == [route.route for route in full.microbatches]
    assert found.predicted.iteration_s <= full.predicted.iteration_s + 1e-9


@settings(max_examples=12, derandomize=True)
@given(problems(), CONTENTIONS)
def test_no_plan_with_relays_is_below_its_bound(problem: Problem, contention: str) -> None:
    problem = share_links(problem, contention)
    plan = plan_with_relays(full_pipeline_of(problem), problem, QUICK)
    assert plan is not None
    validate(plan)
    bound_s = max(lower_bounds(with_best_ways(problem), 0.0).values())
    assert bound_s <= plan.predicted.iteration_s
    assert plan.predicted.lower_bound_s == pytest.approx(bound_s)


def in_a_row(*, weight_s: float | None = None) -> Problem:
    """Return a problem of three stages in a row, where the links past each of them take 100 times as long."""
    nodes = ("a", "b", "c")
    far_s = {("a", "b"): 1.0, ("b", "c"): 1.0, ("c", "a"): 1.0}
    transfer_s = {
        source: {sink: far_s.get((source, sink), far_s.get((sink, source), 1.0)) for sink in nodes if sink != source}
        for source in nodes
    }
    transfer_s["a"]["c"] = transfer_s["c"]["a"] = 100.0
    return Problem(
        nodes=nodes,
        stages=tuple(StageNodes(nodes=(node,)) for node in nodes),
        microbatches_per_origin=8,
        costs=Costs(
            forward_s=dict.fromkeys(nodes, 1.0),
            backward_s=dict.fromkeys(nodes, 2.0),
            loss_s=dict.fromkeys(nodes, 0.5),
            weight_s=None if weight_s is None else dict.fromkeys(nodes, weight_s),
            transfer_s=transfer_s,
            memory=dict.fromkeys(nodes, 8),
        ),
        rules=Rules(num_stages=3, route_length=2, max_swaps=0),
    )


def test_bounds_of_direct_messages_do_not_bind_relays() -> None:
    """Half of the routes go from a to c, which takes 200 s there and back, or 4 s by way of b."""
    problem = in_a_row()
    assert max(lower_bounds(problem, 0.0).values()) > 200
    assert max(lower_bounds(with_best_ways(problem), 0.0).values()) < 50


def uneven_ring() -> Problem:
    """Return a problem of four stages in a ring whose links to the next stage alone are fast."""
    nodes = tuple(f"n{index}" for index in range(4))
    ring = {frozenset((nodes[index], nodes[(index + 1) % 4])) for index in range(4)}
    transfer_s = {
        source: {sink: 0.1 if frozenset((source, sink)) in ring else 30.0 for sink in nodes if sink != source}
        for source in nodes
    }
    return Problem(
        nodes=nodes,
        stages=tuple(StageNodes(nodes=(node,)) for node in nodes),
        microbatches_per_origin=8,
        costs=Costs(
            forward_s=dict.fromkeys(nodes, 1.0),
            backward_s=dict.fromkeys(nodes, 2.0),
            loss_s=dict.fromkeys(nodes, 0.5),
            transfer_s=transfer_s,
            memory=dict.fromkeys(nodes, 8),
        ),
        rules=Rules(num_stages=4, route_length=3, max_swaps=0),
    )


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("weight_s", [None, 1.0])
def test_a_plan_relays_where_the_way_past_a_stage_is_slow(weight_s: float | None, given: bool) -> None:
    problem = uneven_ring()
    if not given:
        problem = problem.model_copy(update={"stages": None, "stage_sizes": (1, 1, 1, 1)})
    if weight_s is not None:
        costs = problem.costs.model_copy(update={"weight_s": dict.fromkeys(problem.nodes, weight_s)})
        problem = problem.model_copy(update={"costs": costs})
    result = solve_with_baselines(PlanRequest(problem, replace(QUICK, max_evaluations=200)))
    validate(result.plan)
    assert result.plan.predicted.iteration_s < result.full_pipeline.predicted.iteration_s
    assert any(microbatch.relays for microbatch in result.plan.microbatches)
    assert result.plan.predicted.lower_bound_s < result.plan.predicted.iteration_s
    assert not result.why_slower
    assert bool(any(result.plan.split_of.values())) == (weight_s is not None)


def test_a_plan_that_nobody_compares_relays_too(monkeypatch: pytest.MonkeyPatch) -> None:
    request = PlanRequest(uneven_ring(), replace(QUICK, max_evaluations=200))
    plan = solve_request(request)
    assert plan.has_relays
    assert plan.predicted.iteration_s < full_pipeline_of(uneven_ring()).predicted.iteration_s
    monkeypatch.setattr("skippipe_scheduler.solver.no_worse._BEYOND_S", 0.0)
    assert solve_request(request) == plan  # where steps are counted, nobody looks at a clock
    assert not solve_request(PlanRequest(uneven_ring(), SolveOptions(time_limit_s=0.2))).has_relays


def test_relays_are_judged_under_jitter_too() -> None:
    options = replace(QUICK, max_evaluations=60, robustness=Robustness(sigma=0.3, samples=3))
    result = solve_with_baselines(PlanRequest(uneven_ring(), options))
    validate(result.plan)
    assert any(microbatch.relays for microbatch in result.plan.microbatches)


def test_no_relays_of_a_full_pipeline_on_other_nodes() -> None:
    full = full_pipeline_of(uneven_ring())
    turned = uneven_ring().model_copy(
        update={"stages": tuple(StageNodes(nodes=(node,)) for node in reversed(full.nodes))}
    )
    assert plan_with_relays(full, turned, QUICK) is None


def test_no_relays_where_timing_them_takes_too_long() -> None:
    full = full_pipeline_of(uneven_ring())
    assert plan_with_relays(full, uneven_ring(), SolveOptions(time_limit_s=0.01)) is not None
    many = uneven_ring().model_copy(update={"microbatches_per_origin": 10_000})
    assert plan_with_relays(full, many, SolveOptions(time_limit_s=0.01)) is None


def test_a_stopped_search_goes_on_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skippipe_scheduler.solver.relays._LONGER_S", 300.0)
    full = full_pipeline_of(uneven_ring())
    unreached = full.predicted.model_copy(update={"iteration_s": 0.1})
    stop = Event()
    stop.set()
    begin_s = perf_counter()
    options = SolveOptions(time_limit_s=1.0, stop=stop)
    assert plan_with_relays(full.model_copy(update={"predicted": unreached}), uneven_ring(), options) is not None
    assert perf_counter() - begin_s < 150


def full_and_short(seed: int, contention: Contention = "none") -> tuple[Plan, Plan]:
    """Return a plan whose routes visit all four stages in order, and one of the same nodes whose routes visit three."""
    shape = {"num_microbatches": 6, "swaps": 0, "contention": contention}
    full = random_plan(seed, num_nodes=7, route_length=4, **shape)  # type: ignore[arg-type]
    return full, random_plan(seed, beside=full, **shape)  # type: ignore[arg-type]


def kept_stages(plan: Plan) -> list[Collection[int]]:
    return [{plan.stage_of[node] for node in microbatch.route} for microbatch in plan.microbatches]


@given(st.integers(0, 10_000), CONTENTIONS)
@settings(max_examples=20)
def test_nothing_is_busier_or_fuller_than_in_the_fuller_plan(seed: int, contention: Contention) -> None:
    full, short = full_and_short(seed, contention)
    found = with_relays(full, kept_stages(short), short.rules)
    whole, less = simulate(full), simulate(found)
    for node in full.nodes:
        assert less.busy_s[node] <= whole.busy_s[node] + 1e-9
        assert less.peak_memory[node] <= whole.peak_memory[node]
    assert contention != "none" or less.iteration_s <= whole.iteration_s + 1e-9


@pytest.mark.parametrize("relays", [0.0, 0.5])
def test_all_at_half_the_pace_takes_twice_as_long(relays: float) -> None:
    drawn = random_plan(3, relays=relays)
    bare = {"task_overhead_s": 0.0, "reduce_s": (0.0,) * len(drawn.stages)}
    plan = drawn.model_copy(update={"costs": drawn.costs.model_copy(update=bare)})
    links = {(one, other): 2.0 for one in plan.nodes for other in plan.nodes if one != other}
    paced = at_pace(plan, dict.fromkeys(plan.nodes, 2.0), links)
    assert paced.predicted.iteration_s == pytest.approx(2 * simulate(plan).iteration_s)


def test_what_relays_wait_for_is_put_down_to_transfers() -> None:
    full, short = full_and_short(1)
    plan = with_relays(full, kept_stages(short), short.rules)
    slow = at_pace(plan, {}, {(one, other): 50.0 for one in plan.nodes for other in plan.nodes if one != other})
    path = critical_path(slow)
    assert {"forward relay", "backward relay"} & path.by_kind.keys()
    assert bottleneck(slow, path).startswith("Bottleneck: transfers, ")
