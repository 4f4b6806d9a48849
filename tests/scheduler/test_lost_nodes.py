"""Plans without lost nodes: the same iteration on the nodes that are left."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st
from independent_checker import first_offence_of
from pydantic import ValidationError
from random_plans import random_plan
from small_problems import make_problem

from skippipe_scheduler.errors import InfeasibleError, PlanError, ProblemError
from skippipe_scheduler.options import SolveOptions
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.problem.rules import Rules, first_offence
from skippipe_scheduler.search.kernel.jit import prepare
from skippipe_scheduler.solver.absent_stages import renumbered_rules, rules_around
from skippipe_scheduler.solver.lost_nodes import replan_without
from skippipe_scheduler.solver.other_routes import other_routes_problem
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
        relays=draw(st.sampled_from([0.0, 0.5])),
    )
    spare = [node for stage in plan.stages for node in draw(st.permutations(stage.nodes))[1:]]
    return plan, set(draw(st.lists(st.sampled_from(spare), min_size=1, unique=True)))


@given(losses())
@settings(max_examples=60)
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
    assert all(microbatch.path is None for microbatch in found.microbatches), "messages go direct"
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


@pytest.mark.parametrize("relays", [0.0, 0.5])
@given(st.integers(0, 10_000), st.integers(3, 6), st.data())
@settings(max_examples=25)
def test_routes_leave_out_stages_that_nobody_holds(
    relays: float, seed: int, num_stages: int, data: st.DataObject
) -> None:
    plan = random_plan(
        seed,
        num_nodes=num_stages + 4,
        num_stages=num_stages,
        route_length=data.draw(st.integers(2, num_stages)),
        num_microbatches=data.draw(st.integers(1, 10)),
        swaps=data.draw(st.integers(0, 2)),
        split=data.draw(st.sampled_from([0.0, 0.5])),
        relays=relays,
    )
    absent = data.draw(st.sets(st.integers(1, num_stages - 1), min_size=1, max_size=num_stages - 2))
    lost = {node for stage in absent for node in plan.stages[stage].nodes}
    found = replan_without(plan, lost, MENDED, lost_stage="routes_around")
    validate(found)
    assert first_offence_of(json.loads(found.to_json())) is None
    assert found.rules.absent_stages == tuple(sorted(absent))
    assert [stage.layers for stage in found.stages] == [stage.layers for stage in plan.stages]
    assert found.nodes == tuple(node for node in plan.nodes if node not in lost)
    assert len(found.microbatches) == len(plan.microbatches)
    length = min(plan.rules.route_length, num_stages - len(absent))
    assert {len(microbatch.route) for microbatch in found.microbatches} == {length}
    assert all(microbatch.path is None for microbatch in found.microbatches), "messages go direct"
    assert found.visits[0] == len(plan.microbatches)
    limits = ("max_swaps", "max_swap_distance", "max_forward_jump", "uniform_coverage")
    assert [getattr(found.rules, name) for name in limits] == [getattr(plan.rules, name) for name in limits]


def full_pipeline() -> Plan:
    plan = random_plan(3, num_nodes=6, route_length=4, swaps=0, num_microbatches=6)
    rules = plan.rules.model_copy(update={"max_forward_jump": 1, "protected_stages": (1,)})
    return plan.model_copy(update={"rules": rules})


def test_a_full_pipeline_loses_one_stage_and_keeps_the_rest() -> None:
    plan = full_pipeline()
    found = replan_without(plan, plan.stages[2].nodes, MENDED, lost_stage="routes_around")
    validate(found)
    assert found.visits == (6, 6, 0, 6)
    gone = set(plan.stages[2].nodes)
    assert [microbatch.route for microbatch in found.microbatches] == [
        tuple(node for node in microbatch.route if node not in gone) for microbatch in plan.microbatches
    ]
    assert found.predicted.iteration_s < plan.predicted.iteration_s


def test_swaps_over_an_absent_stage_count_it() -> None:
    rules = Rules(num_stages=6, route_length=4, max_swap_distance=2, protected_stages=(4, 5))
    around = rules_around(rules, [2])
    assert (around.absent_stages, around.protected_stages, around.shared_stages) == ((2,), (4, 5), (1, 3))
    assert first_offence([0, 4, 1, 5], around) == (
        "visits stage 1 after stage 4, a swap of distance 3; max_swap_distance is 2 (releases up to 0.2 counted the "
        "higher stages visited before, here 1, not the stage numbers between; plan again)"
    )
    assert first_offence([0, 2, 4, 5], around) == "visits stage 2, absent_stages are [2]"
    numbered = renumbered_rules(around)
    assert (numbered.num_stages, numbered.max_swap_distance, numbered.protected_stages) == (5, 1, (3, 4))
    assert renumbered_rules(rules_around(rules, [5])).max_swap_distance == 2


def test_a_jump_does_not_count_absent_stages() -> None:
    around = rules_around(Rules(num_stages=5, route_length=5, max_swaps=0, max_forward_jump=1), [2, 3])
    assert (around.route_length, first_offence([0, 1, 4], around)) == (3, None)
    assert first_offence([0, 4, 1], around) == (
        "jumps from stage 0 to 4, 2 past the furthest visited; max_forward_jump is 1"
    )


def test_a_mix_of_lengths_shrinks_where_it_has_to() -> None:
    rules = Rules(num_stages=4, route_length=4, route_lengths={4: 1, 3: 1, 2: 2})
    assert rules_around(rules, [3]).route_lengths == {3: 2, 2: 2}


def test_stage_0_is_never_left_out() -> None:
    plan = full_pipeline()
    with pytest.raises(
        InfeasibleError, match=r"stage 0 \(layers 0 to 0\) has no node left: .* lost; bring one of them"
    ):
        replan_without(plan, plan.stages[0].nodes, MENDED, lost_stage="routes_around")


def test_one_stage_alone_is_no_pipeline() -> None:
    plan = full_pipeline()
    others = [node for node in plan.nodes if plan.stage_of[node]]
    with pytest.raises(InfeasibleError, match="only stage 0 has nodes left"):
        replan_without(plan, others, MENDED, lost_stage="routes_around")


def test_nodes_are_lost_from_the_plan_of_all() -> None:
    plan = full_pipeline()
    around = replan_without(plan, plan.stages[2].nodes, MENDED, lost_stage="routes_around")
    with pytest.raises(PlanError, match="the plan leaves out stage 2, so it is not the plan of all nodes"):
        replan_without(around, plan.stages[0].nodes[:1], MENDED, lost_stage="routes_around")
    with pytest.raises(ProblemError, match="the plan leaves out stage 2; begin at the plan of all nodes"):
        other_routes_problem(around, around.rules)


def test_only_stages_said_to_be_absent_may_be_empty() -> None:
    plan = full_pipeline()
    around = replan_without(plan, plan.stages[2].nodes, MENDED, lost_stage="routes_around")
    unsaid = around.rules.model_copy(update={"absent_stages": None})
    with pytest.raises(PlanError, match=r"stages.2: has no node; give it one, or name it in rules.absent_stages"):
        validate(around.model_copy(update={"rules": unsaid}))
    with pytest.raises(PlanError, match=r"stages.2: has node '.*', but rules.absent_stages name it"):
        validate(plan.model_copy(update={"rules": around.rules}))


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        ((0,), r"absent_stages are \[0\]; they ascend and lie within 1 to 3"),
        ((2, 2), r"absent_stages are \[2, 2\]; they ascend"),
        ((1, 2), "route_length 3 is more than the 2 stages that are not absent"),
        ((3,), "stage 3 is in absent_stages and in protected_stages"),
    ],
)
def test_wrong_absent_stages_are_refused(absent: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Rules(num_stages=4, route_length=3, protected_stages=(3,), absent_stages=absent)


def test_a_problem_has_no_absent_stages() -> None:
    problem = make_problem(3, [2, 1, 2, 1], 2, 6)
    content = problem.model_dump() | {"rules": problem.rules.model_copy(update={"absent_stages": (2,)})}
    with pytest.raises(ValidationError, match="leave them out of a problem"):
        Problem.model_validate(content)
