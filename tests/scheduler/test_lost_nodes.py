"""Plans without lost nodes: the same iteration on the nodes that are left."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st
from independent_checker import first_offence_of
from random_plans import random_plan
from small_problems import make_problem

from skippipe_scheduler.errors import InfeasibleError, PlanError
from skippipe_scheduler.options import SolveOptions
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.search.kernel.jit import prepare
from skippipe_scheduler.solver.lost_nodes import replan_without
from skippipe_scheduler.solver.solve import solve

MENDED = SolveOptions(time_limit_s=0.0)
prepare(None)  # a search without time would not wait for the kernel, nor would those of the tests behind it


@st.composite
def losses(draw: st.DrawFn) -> tuple[Plan, set[str]]:
    """Draw a plan and nodes of it that can be lost: of every stage one is left."""
    num_stages = draw(st.integers(2, 5))
    plan = random_plan(
        draw(st.integers(0, 10_000)),
        num_nodes=draw(st.integers(num_stages + 1, 10)),
        num_stages=num_stages,
        route_length=draw(st.integers(2, num_stages)),
        num_microbatches=draw(st.integers(1, 10)),
        memory=draw(st.integers(1, 3)),
        contention=draw(st.sampled_from(["none", "link", "node"])),
        split=draw(st.sampled_from([0.0, 0.5])),
    )
    spare = [node for stage in plan.stages for node in draw(st.permutations(stage.nodes))[1:]]
    return plan, set(draw(st.lists(st.sampled_from(spare), min_size=1, unique=True)))


@given(losses())
@settings(deadline=None, max_examples=60)
def test_the_iteration_goes_on_without_the_lost_nodes(loss: tuple[Plan, set[str]]) -> None:
    plan, lost = loss
    found = replan_without(plan, lost, MENDED)
    validate(found)
    assert first_offence_of(json.loads(found.to_json())) is None
    assert found.nodes == tuple(node for node in plan.nodes if node not in lost)
    assert [stage.layers for stage in found.stages] == [stage.layers for stage in plan.stages]
    for stage, before in zip(found.stages, plan.stages, strict=True):
        assert stage.nodes == tuple(node for node in before.nodes if node not in lost)
    assert [microbatch.id for microbatch in found.microbatches] == [microbatch.id for microbatch in plan.microbatches]
    assert (found.rules, found.costs.contention) == (plan.rules, plan.costs.contention)
    for before_it, after in zip(plan.microbatches, found.microbatches, strict=True):
        for node, other in zip(before_it.route[1:], after.route[1:], strict=True):
            assert other == node or node in lost, "only a lost node is left"


@pytest.mark.parametrize("split", [0.0, 0.5])
def test_a_search_goes_on_from_the_mended_plan(split: float) -> None:
    plan = random_plan(7, num_nodes=9, num_stages=4, num_microbatches=24, split=split)
    lost = {stage.nodes[0] for stage in plan.stages if len(stage.nodes) > 1}
    mended = replan_without(plan, lost, MENDED)
    found = replan_without(plan, lost, SolveOptions(max_evaluations=500))
    validate(found)
    assert found.predicted.iteration_s < mended.predicted.iteration_s
    assert found.hash == replan_without(plan, lost, SolveOptions(max_evaluations=500)).hash


def test_even_shares_of_the_origins_stay_even() -> None:
    plan = solve(make_problem(5, [3, 2, 2], 2, 14), SolveOptions(max_evaluations=50))
    found = replan_without(plan, plan.stages[0].nodes[:1], MENDED)
    assert sorted(Counter(microbatch.route[0] for microbatch in found.microbatches).values()) == [7, 7]


def test_a_plan_that_lost_nobody_is_the_plan() -> None:
    plan = random_plan(3)
    assert replan_without(plan, (), SolveOptions()) is plan


def test_a_stage_without_a_node_is_named() -> None:
    plan = random_plan(3, num_nodes=6, num_stages=4, layers_per_stage=2)
    alone = next(stage for stage in plan.stages if len(stage.nodes) == 1)
    index = plan.stages.index(alone)
    message = rf"stage {index} \(layers {2 * index} to {2 * index + 1}\) has no node left: '{alone.nodes[0]}' lost"
    with pytest.raises(InfeasibleError, match=message) as caught:
        replan_without(plan, alone.nodes, MENDED)
    assert caught.value.stage == index


def test_an_unknown_node_is_named() -> None:
    with pytest.raises(PlanError, match=r"lost node 'nod-1' is not in the plan; did you mean 'node-1'\?"):
        replan_without(random_plan(3), ["nod-1"], MENDED)


def test_a_replica_that_is_left_alone_reduces_nothing() -> None:
    plan = random_plan(3, num_nodes=6, num_stages=3)
    stage = next(index for index, stage in enumerate(plan.stages) if len(stage.nodes) == 2)
    reduce_s = replan_without(plan, plan.stages[stage].nodes[:1], MENDED).costs.reduce_s
    assert plan.costs.reduce_s is not None
    assert reduce_s == tuple(0.0 if index == stage else taken_s for index, taken_s in enumerate(plan.costs.reduce_s))
