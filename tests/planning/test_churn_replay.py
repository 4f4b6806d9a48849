"""A failure trace replayed over a run: by hand, at random, and what the other methods assume."""

import math
from collections.abc import Set
from functools import cache

import pytest
from hypothesis import given, settings, strategies as st
from random_plans import random_plan

from skippipe.errors import ConfigError
from skippipe.planning.churn.churn_costs import BYTES_PER_PARAMETER, ChurnCosts, best_interval_s, lost_share
from skippipe.planning.churn.comparison import ChurnOptions, compare_methods
from skippipe.planning.churn.failure_trace import FailureTrace, NodeChange, drawn_losses
from skippipe.planning.churn.methods import (
    REDUNDANT_FACTOR,
    CheckpointRestart,
    FixedSizeRestart,
    InRunRecovery,
    RecoveryMethod,
    RedundantComputation,
    StageRebuilding,
)
from skippipe.planning.churn.replay import ReplayedRun, replay
from skippipe.planning.churn.surviving_paces import SurvivingPaces
from skippipe.planning.surviving_plans import plans_without
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe_scheduler.options import SolveOptions
from skippipe_scheduler.solver.lost_nodes import replan_without

PLAN = replan_without(
    random_plan(3, num_nodes=10, num_stages=4, num_microbatches=8, contention="link"),
    ["node-0"],
    SolveOptions(max_evaluations=100),
)
WHOLE_S = PLAN.predicted.iteration_s
ALL = frozenset(PLAN.nodes)
COSTS = ChurnCosts(detection=1, agreement=2, planning=3, groups=4, restart=20, checkpoint=5, rebuild=30)
PACES = SurvivingPaces(PLAN, max_evaluations=0)
NEVER = math.inf
OTHERS: tuple[type[RecoveryMethod], ...] = (
    CheckpointRestart,
    FixedSizeRestart,
    RedundantComputation,
    StageRebuilding,
)
METHODS: tuple[RecoveryMethod, ...] = (
    *(InRunRecovery(PACES, COSTS, 2.2 * WHOLE_S, 1e9, lost_stage=way) for way in ("routes_around", "stop")),
    *(kind(PACES, COSTS, 2.2 * WHOLE_S, 1e9) for kind in OTHERS),
)
FIRST, SECOND = PLAN.stages[1].nodes[1], PLAN.stages[3].nodes[1]
LOST_STAGE = frozenset(PLAN.stages[1].nodes)
LOSABLE = LOST_STAGE | {*PLAN.stages[0].nodes}
"""Few enough for a plan for each set of what is left of them."""


@cache
def pace_s(*lost: str) -> float:
    """Return what the planner that a run asks after a loss promises, as the replay counts it."""
    left = plans_without(PlanSet(PLAN, {}), lost, time_limit_s=60.0, max_evaluations=0)
    return max(WHOLE_S, left.main.predicted.iteration_s)


def changes(*entries: tuple[float, Set[str], Set[str]]) -> tuple[NodeChange, ...]:
    return tuple(NodeChange(time_s, frozenset(lost), frozenset(back)) for time_s, lost, back in entries)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}-{getattr(method, 'lost_stage', '')}")
def test_without_losses_only_checkpoints_and_redundant_work_take_time(method: RecoveryMethod) -> None:
    run = replay(FailureTrace(10 * WHOLE_S, ()), method)
    assert {*run.lost_s} <= {"checkpoints", "redundant work"}
    rare = replay(FailureTrace(10 * WHOLE_S, ()), type(method)(PACES, COSTS, NEVER))
    expected = 1 / REDUNDANT_FACTOR if isinstance(method, RedundantComputation) else 1.0
    assert rare.goodput == pytest.approx(expected)


def two_losses() -> tuple[FailureTrace, float, float]:
    """Two losses, each in the middle of a step; also the iteration times after each."""
    one_s, two_s = pace_s(FIRST), pace_s(FIRST, SECOND)
    assert WHOLE_S < one_s < two_s
    begin_s = 2.5 * WHOLE_S
    again_s = begin_s + 7 + 1.25 * one_s
    trace = FailureTrace(again_s + 10 + 2 * two_s, changes((begin_s, {FIRST}, set()), (again_s, {SECOND}, set())))
    return trace, one_s, two_s


def test_two_losses_by_hand_in_the_run() -> None:
    trace, one_s, two_s = two_losses()
    run = replay(trace, InRunRecovery(PACES, COSTS, NEVER))
    assert run.lost_s == {
        "detection": pytest.approx(2),
        "agreement": pytest.approx(4),
        "planning": pytest.approx(3),
        "groups": pytest.approx(8),
        "interrupted work": pytest.approx(0.5 * WHOLE_S + 0.25 * one_s),
        "fewer nodes": pytest.approx((one_s - WHOLE_S) + 2 * (two_s - WHOLE_S)),
    }
    assert run.useful_s == pytest.approx(5 * WHOLE_S)
    assert [stretch.throughput for stretch in run.stretches] == pytest.approx(
        [1, 0, WHOLE_S / one_s, 0, WHOLE_S / two_s]
    )


def test_two_losses_by_hand_with_restarts() -> None:
    trace, one_s, two_s = two_losses()
    trace = FailureTrace(
        trace.duration_s + 25, changes(*((c.time_s + 14 * n, c.lost, c.back) for n, c in enumerate(trace.changes)))
    )
    run = replay(trace, CheckpointRestart(PACES, COSTS, 3.5 * two_s))
    assert run.lost_s == {
        "detection": pytest.approx(2),
        "restarts": pytest.approx(40),
        "interrupted work": pytest.approx(0.5 * WHOLE_S + 0.25 * one_s),
        "work since a checkpoint": pytest.approx(2 * WHOLE_S + one_s),
        "fewer nodes": pytest.approx(2 * (two_s - WHOLE_S)),
    }
    assert run.useful_s == pytest.approx(2 * WHOLE_S)
    assert run.rollbacks == 2


def test_a_run_that_needs_all_nodes_waits_for_those_that_are_lost() -> None:
    begin_s, first_back_s = 2.5 * WHOLE_S, 9 * WHOLE_S
    back_s = first_back_s + 3 * WHOLE_S
    trace = FailureTrace(
        back_s + 20 + 2 * WHOLE_S,
        changes((begin_s, {FIRST, SECOND}, set()), (first_back_s, set(), {FIRST}), (back_s, set(), {SECOND})),
    )
    run = replay(trace, FixedSizeRestart(PACES, COSTS, NEVER))
    assert run.lost_s == {
        "detection": pytest.approx(1),
        "waiting": pytest.approx(back_s - begin_s - 1),
        "restarts": pytest.approx(20),
        "interrupted work": pytest.approx(0.5 * WHOLE_S),
        "work since a checkpoint": pytest.approx(2 * WHOLE_S),
    }
    assert run.useful_s == pytest.approx(2 * WHOLE_S)


def test_a_checkpoint_saves_what_was_done_before_it() -> None:
    trace = FailureTrace(4 * WHOLE_S + 6, changes((3.5 * WHOLE_S + 5, {FIRST}, set())))
    run = replay(trace, CheckpointRestart(PACES, COSTS, 1.5 * WHOLE_S))  # due within the second step, taken at its end
    assert run.lost_s["checkpoints"] == pytest.approx(5)
    assert run.lost_s["work since a checkpoint"] == pytest.approx(WHOLE_S)
    assert run.useful_s == pytest.approx(2 * WHOLE_S, abs=0.5 * WHOLE_S)


def test_a_node_that_is_back_is_in_at_the_end_of_a_step() -> None:
    one_s = pace_s(FIRST)
    begin_s = 0.5 * WHOLE_S
    back_s = begin_s + 7 + 0.1 * one_s
    trace = FailureTrace(begin_s + 7 + one_s + 6 + one_s, changes((begin_s, {FIRST}, set()), (back_s, set(), {FIRST})))
    run = replay(trace, InRunRecovery(PACES, COSTS, NEVER))
    assert run.lost_s["groups"] == pytest.approx(8)
    assert run.lost_s["agreement"] == pytest.approx(4)
    assert "planning" not in run.lost_s
    assert run.lost_s["fewer nodes"] == pytest.approx(2 * (one_s - WHOLE_S))  # its first iteration is without it
    assert run.useful_s == pytest.approx(2 * WHOLE_S)


def test_state_travels_over_the_best_link_of_a_replica() -> None:
    method = InRunRecovery(PACES, COSTS, NEVER, parameters=1e9)
    stage, costs = PLAN.stages[1], PLAN.costs
    assert costs.latency_s is not None
    assert costs.gbit_per_s is not None
    gbit = 1e9 * BYTES_PER_PARAMETER * 8e-9 * (stage.layers[1] - stage.layers[0]) / PLAN.num_layers
    times_s = [costs.latency_s[giver][FIRST] + gbit / costs.gbit_per_s[giver][FIRST] for giver in stage.nodes[:1]]
    assert method.transfer_s(FIRST, ALL - {FIRST}) == pytest.approx(min(times_s))
    assert InRunRecovery(PACES, COSTS, NEVER).transfer_s(FIRST, ALL - {FIRST}) == 0.0


def test_all_wait_for_what_of_a_state_takes_longer_than_an_iteration() -> None:
    trace = FailureTrace(200 * WHOLE_S, changes((WHOLE_S, {FIRST}, set()), (2 * WHOLE_S, set(), {FIRST})))
    long, short = (InRunRecovery(PACES, COSTS, NEVER, parameters=parameters) for parameters in (1e9, 1.0))
    transfer_s = long.transfer_s(FIRST, ALL - {FIRST})
    assert short.transfer_s(FIRST, ALL - {FIRST}) < pace_s(FIRST) < transfer_s < 100 * WHOLE_S
    assert replay(trace, long).lost_s["state transfer"] == pytest.approx(transfer_s - pace_s(FIRST))
    assert "state transfer" not in replay(trace, short).lost_s
    assert "state transfer" not in replay(trace, RedundantComputation(PACES, COSTS, NEVER, parameters=1e9)).lost_s


def test_all_wait_for_the_state_of_a_stage_that_nobody_holds() -> None:
    ours = InRunRecovery(PACES, COSTS, NEVER, parameters=1e6)
    pauses = ours.join_pauses({FIRST}, ALL - LOST_STAGE)
    assert pauses["state transfer"] == ours.transfer_s(FIRST, ALL - LOST_STAGE) > 0
    assert "fewer nodes" not in pauses


def lost_stage_run(method: RecoveryMethod) -> ReplayedRun:
    lost_s, back_s = 3.5 * WHOLE_S, 8.5 * WHOLE_S
    return replay(FailureTrace(20 * WHOLE_S, changes((lost_s, LOST_STAGE, set()), (back_s, set(), LOST_STAGE))), method)


def test_what_a_lost_stage_costs_each_way() -> None:
    stopped = lost_stage_run(InRunRecovery(PACES, COSTS, NEVER, lost_stage="stop"))
    assert (stopped.rollbacks, stopped.changed_stages) == (1, 0)
    assert stopped.lost_s["work since a checkpoint"] == pytest.approx(3 * WHOLE_S)
    assert stopped.lost_s["waiting"] == pytest.approx(5 * WHOLE_S - 21)
    around = lost_stage_run(InRunRecovery(PACES, COSTS, NEVER))
    assert (around.rollbacks, around.changed_stages) == (0, 1)
    assert "waiting" not in around.lost_s
    rebuilt = lost_stage_run(StageRebuilding(PACES, COSTS, NEVER))
    assert (rebuilt.changed_stages, rebuilt.rollbacks) == (1, 0)
    assert rebuilt.lost_s["rebuilding"] == pytest.approx(30)
    redundant = lost_stage_run(RedundantComputation(PACES, COSTS, NEVER))
    assert (redundant.rollbacks, "interrupted work" in redundant.lost_s) == (0, False)
    assert stopped.goodput < around.goodput


def test_without_a_node_for_the_first_stage_the_run_begins_from_its_checkpoint() -> None:
    aftermath = InRunRecovery(PACES, COSTS, NEVER).after_loss(ALL, {*PLAN.stages[0].nodes})
    assert aftermath.back_to == "checkpoint"


@pytest.mark.parametrize("stages", [(0,), (1, 2)], ids=["the first", "two neighbours"])
def test_what_cannot_be_rebuilt_is_read_from_the_checkpoint(stages: tuple[int, ...]) -> None:
    lost = frozenset(node for stage in stages for node in PLAN.stages[stage].nodes)
    aftermath = StageRebuilding(PACES, COSTS, NEVER).after_loss(ALL, lost)
    assert (aftermath.back_to, aftermath.changed_stages) == ("checkpoint", 0)


def test_what_stands_in_may_be_lost_too() -> None:
    method = RedundantComputation(PACES, COSTS, NEVER)
    assert method.after_loss(ALL, LOST_STAGE).back_to == "this instant"
    assert method.after_loss(ALL, LOST_STAGE | {*PLAN.stages[2].nodes}).back_to == "checkpoint"


@st.composite
def traces(draw: st.DrawFn) -> FailureTrace:
    """Return a trace of losses and returns at any instants."""
    times_s = sorted(draw(st.sets(st.floats(0.01, 19.9), max_size=8)))
    away: frozenset[str] = frozenset()
    entries = []
    for time_s in times_s:
        lost = (
            draw(st.frozensets(st.sampled_from(sorted(LOSABLE - away)), max_size=3)) if LOSABLE - away else frozenset()
        )
        back = draw(st.frozensets(st.sampled_from(sorted(away | lost)), max_size=3)) if away | lost else frozenset()
        away = (away | lost) - back
        entries.append((time_s * WHOLE_S, lost, back))
    return FailureTrace(20 * WHOLE_S, changes(*entries))


@settings(max_examples=20)
@given(trace=traces())
def test_useful_and_lost_time_add_up_for_any_trace(trace: FailureTrace) -> None:
    for method in METHODS:
        run = replay(trace, method)
        assert 0.0 <= run.goodput <= 1.0
        assert all(lost_s >= 0 for lost_s in run.lost_s.values())
        assert run.useful_s + sum(run.lost_s.values()) == pytest.approx(trace.duration_s)
        assert [stretch.end_s for stretch in run.stretches[:-1]] == [stretch.start_s for stretch in run.stretches[1:]]
        assert run.stretches[0].start_s == 0.0
        assert run.stretches[-1].end_s == pytest.approx(trace.duration_s)


@given(checkpoint_s=st.floats(0.1, 100), mtbf_s=st.floats(300, 1e6), factor=st.floats(0.1, 10))
def test_the_best_interval_is_the_minimum_of_its_curve(checkpoint_s: float, mtbf_s: float, factor: float) -> None:
    best_s = best_interval_s(checkpoint_s, mtbf_s)
    assert lost_share(best_s, checkpoint_s, 20, mtbf_s) <= lost_share(best_s * factor, checkpoint_s, 20, mtbf_s) + 1e-12
    assert best_interval_s(mtbf_s, mtbf_s) == mtbf_s


def test_equal_arguments_give_equal_comparisons() -> None:
    trace = drawn_losses([FIRST], 4 * WHOLE_S, 30 * WHOLE_S, rejoin_s=2 * WHOLE_S, seed=5)
    first, second = (compare_methods(PLAN, trace, ChurnOptions(max_evaluations=0)) for _ in range(2))
    assert first.runs == second.runs
    others = ["checkpoint-restart", "checkpoint-restart, all nodes", "redundant computation", "stage rebuilding"]
    assert [*first.runs] == ["in the run", *others]
    assert first.num_planned == 2


def test_a_cost_that_does_not_exist_is_refused() -> None:
    assert ChurnCosts().with_changes({"restart": 60.0}).restart == 60.0
    with pytest.raises(ConfigError, match="detection, agreement, planning, groups, restart, checkpoint, rebuild"):
        ChurnCosts().with_changes({"reboot": 1.0})
