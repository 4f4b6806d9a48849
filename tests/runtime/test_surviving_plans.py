"""All plans of a run without lost nodes: together, in a given time, and still proved programs."""

import pytest
from random_plans import random_plan

from skippipe.monitor.console import ParameterCounts, start_table
from skippipe.monitor.report.figures.route_map import routes_figure
from skippipe.planning.surviving_plans import improved_plans, plans_without
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.program.program import compile_evaluation, compile_programs
from skippipe.runtime.program.verifier import prove, prove_transfers
from skippipe_scheduler.analysis.explain import explain
from skippipe_scheduler.errors import InfeasibleError
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.search.kernel.jit import prepare

prepare(None)  # a search without time would not wait for the kernel, nor would those of the tests behind it
MAIN = random_plan(3, num_nodes=9, num_stages=4, num_microbatches=8)
PLANS = PlanSet(MAIN, {"phase-1": random_plan(4, route_length=2, num_microbatches=8, beside=MAIN)})
REPLICA = next(stage.nodes[:1] for stage in MAIN.stages if len(stage.nodes) > 1)


def test_all_plans_of_a_run_lose_the_same_nodes() -> None:
    found = plans_without(PLANS, REPLICA, time_limit_s=0.0)
    assert [*found] == [*PLANS]
    for name, plan in found.items():
        validate(plan)
        prove(compile_programs(plan, activation_bytes=128), plan)
        assert (plan.rules, len(plan.microbatches)) == (PLANS[name].rules, len(PLANS[name].microbatches))
    assert PlanSet.from_json(found.to_json()).hash == found.hash


def test_plans_of_a_run_that_lost_nobody_are_the_same() -> None:
    assert plans_without(PLANS, (), time_limit_s=1.0).hash == PLANS.hash


def test_plans_of_nodes_that_stay_are_searched_further() -> None:
    (plan,) = (plan for _, plan in improved_plans(PlanSet(MAIN), time_limit_s=1.0, max_evaluations=20).items())
    validate(plan)
    assert (plan.stages, plan.rules) == (MAIN.stages, MAIN.rules)
    assert plan.predicted.iteration_s < MAIN.predicted.iteration_s


def test_an_origin_that_is_slow_begins_fewer_microbatches_where_it_may() -> None:
    plan = random_plan(2, num_nodes=4, num_stages=2, route_length=2, num_microbatches=6)
    first, *_ = (node for node in plan.stages[0].nodes)
    slow = PlanSet(plan).at_pace({first: 6.0})
    even, free = (
        improved_plans(slow, time_limit_s=1.0, max_evaluations=200, free_origins=free).main for free in (False, True)
    )
    shares = [sum(microbatch.route[0] == first for microbatch in found.microbatches) for found in (even, free)]
    assert shares[1] < shares[0] == len(plan.microbatches) // len(plan.stages[0].nodes)
    assert free.predicted.iteration_s < even.predicted.iteration_s


def test_routes_around_a_stage_are_proved_programs() -> None:
    found = plans_without(PLANS, MAIN.stages[2].nodes, time_limit_s=0.0, lost_stage="routes_around")
    for plan in (found.main, found["phase-1"]):
        validate(plan)
        prove(compile_programs(plan, activation_bytes=128), plan)
        prove_transfers(compile_evaluation(plan, 128, 5))
        assert (plan.visits[2], plan.present_stages) == (0, (0, 1, 3))


def test_a_stage_that_nobody_holds_stops_the_run() -> None:
    with pytest.raises(InfeasibleError, match=r"stage 2 .* has no node left"):
        plans_without(PLANS, MAIN.stages[2].nodes, time_limit_s=0.0)


def test_tables_and_reports_show_a_stage_that_nobody_holds() -> None:
    plan = plans_without(PLANS, MAIN.stages[2].nodes, time_limit_s=0.0, lost_stage="routes_around").main
    assert f"    2  {plan.stages[2].layers[0]}-{plan.stages[2].layers[1] - 1}" in start_table(
        plan, ParameterCounts(1, 1), 1
    )
    assert "nobody" in start_table(plan, ParameterCounts(1, 1), 1)
    assert explain(plan)
    lines = [trace for trace in routes_figure(plan).data if len(trace.x or ()) > 1]
    assert {x for trace in lines for x in trace.x if x is not None} >= {0.0, 1.0, 3.0}
