"""The first iteration with nodes that have come: they have a place and no microbatch, and get their state meanwhile."""

from pathlib import Path

import pytest
from random_plans import random_plan
from training_runs import make_experiment

from skippipe.errors import PlanError
from skippipe.planning.surviving_plans import plans_without
from skippipe.runtime.plans.plan_set import MAIN_PLAN, PlanSet
from skippipe.runtime.program.program import Opcode, compile_programs
from skippipe.runtime.program.verifier import prove
from skippipe.training.recovery.lost_stage.situation import Situation
from skippipe.training.recovery.plans.epoch_plans import EpochPlans
from skippipe_scheduler.plan.idle_nodes import with_idle_nodes
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.search.kernel.jit import prepare

prepare(None)  # a search without time would not wait for the kernel
WHOLE = random_plan(1, num_nodes=9, num_stages=4, num_microbatches=8)
REPLICA = next(stage.nodes[0] for stage in WHOLE.stages[1:] if len(stage.nodes) > 1)
ORIGIN = WHOLE.stages[0].nodes[0]
SOLE = next(stage.nodes[0] for stage in WHOLE.stages if len(stage.nodes) == 1)


def without(*nodes: str) -> Plan:
    return plans_without(PlanSet(WHOLE), nodes, time_limit_s=0.0).main


@pytest.mark.parametrize("come", [(REPLICA,), (ORIGIN,), (REPLICA, ORIGIN)])
def test_who_comes_has_a_place_and_no_microbatch(come: tuple[str, ...]) -> None:
    before = without(*come)
    plan = with_idle_nodes(before, WHOLE)
    validate(plan)
    assert [plan.order[node] for node in come] == [()] * len(come)
    assert (plan.microbatches, plan.nodes, plan.stages) == (before.microbatches, WHOLE.nodes, WHOLE.stages)
    assert all(plan.order[node] == before.order[node] for node in before.nodes)
    programs = compile_programs(plan, activation_bytes=128)
    prove(programs, plan)
    idle = [program for program in programs if program.node in come]
    ending = [Opcode.REDUCE, Opcode.STEP]
    assert [[step.opcode for step in program.instructions] for program in idle] == [ending] * len(come)


def test_a_node_with_another_place_is_refused() -> None:
    swapped = {REPLICA: ORIGIN, ORIGIN: REPLICA}
    stages = [
        stage.model_copy(update={"nodes": tuple(swapped.get(node, node) for node in stage.nodes)})
        for stage in WHOLE.stages
    ]
    with pytest.raises(PlanError, match="and not in the other"):
        with_idle_nodes(without(REPLICA), WHOLE.model_copy(update={"stages": tuple(stages)}))


def test_first_iteration_is_no_part_of_what_a_checkpoint_is_told() -> None:
    plans = PlanSet(WHOLE).with_joining(with_idle_nodes(without(REPLICA), WHOLE))
    assert plans.hash == WHOLE.hash
    assert PlanSet.from_json(plans.to_json()).joining == plans.joining
    turned = plans.in_rank_order(WHOLE.nodes[::-1]).joining
    assert turned is not None
    assert turned.nodes == WHOLE.nodes[::-1]


def test_others_train_where_somebody_stands_at_the_stage_of_who_comes(tmp_path: Path) -> None:
    known = EpochPlans(make_experiment(tmp_path, recovery={"planning_s": 0.0}), PlanSet(WHOLE))

    def joined(*come: str) -> Plan | None:
        standing = frozenset(WHOLE.nodes) - {*come}
        situation = Situation(known.whole, WHOLE.nodes, standing, {}, frozenset(), known.moves, limit_s=0.0)
        return known.with_joining(known.without(known.whole, ()), situation, after_step=3).joining

    assert joined() is None
    plan = joined(REPLICA)
    assert plan is not None
    assert plan.order[REPLICA] == ()
    assert plan.microbatches == known.without(known.whole, [REPLICA])[MAIN_PLAN].microbatches
    assert joined(SOLE) is None
    assert joined(REPLICA, SOLE) is None


def test_only_plans_that_the_next_change_may_ask_for_are_kept(tmp_path: Path) -> None:
    recovery = {"planning_s": 0.0, "plans_ahead": False}
    known = EpochPlans(make_experiment(tmp_path, recovery=recovery), PlanSet(WHOLE))
    losses = [(), (REPLICA,), (REPLICA, ORIGIN)]
    made = {lost: known.without(known.whole, lost) for lost in losses}
    for missing, kept in (({REPLICA, ORIGIN}, losses), ({ORIGIN}, [(), (REPLICA, ORIGIN)]), (set(), [()])):
        known.plan_ahead([node for node in WHOLE.nodes if node not in missing], rank=0)
        assert [known.without(known.whole, lost) is made[lost] for lost in kept] == [True] * len(kept)
    assert known.without(known.whole, losses[1]) is not made[losses[1]]
