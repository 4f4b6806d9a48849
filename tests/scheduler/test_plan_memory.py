"""The peak of every node of a plan, against a count by hand and against what the planner allows."""

import pytest
from hypothesis import given, settings, strategies as st
from random_plans import random_plan, with_exact_times

from skippipe_scheduler.errors import InfeasibleError
from skippipe_scheduler.plan.plan import Plan, PlanStage, Route, Task
from skippipe_scheduler.plan.plan_memory import check_memory, memory_of_one_process, plan_memory
from skippipe_scheduler.plan.simulate import simulate
from skippipe_scheduler.problem.memory import stage_needs
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.problem.workload import Workload

WORKLOAD = Workload(
    num_layers=4,
    layer_forward_flop=1.0,
    loss_flop=1.0,
    activation_bytes=1,
    layer_gradient_bytes=1,
    embedding_and_head_gradient_bytes=0,
    layer_state_bytes=10_000,
    embedding_and_head_state_bytes=100_000,
    layer_resident_bytes=100,
    embedding_and_head_resident_bytes=20,
    stage_resident_bytes=30,
    working_bytes=500,
    embedding_and_head_working_bytes=900,
    message_bytes=12,
    layer_copy_bytes=5_000,
    embedding_and_head_copy_bytes=50_000,
)


@pytest.mark.parametrize("relays", [0.0, 0.5])
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.7]))
@settings(max_examples=40)
def test_peaks_of_random_plans(relays: float, seed: int, split: float) -> None:
    plan = random_plan(seed, split=split, relays=relays)
    timeline = simulate(plan)
    needs = stage_needs(WORKLOAD, plan.layers_per_stage, [len(stage.nodes) for stage in plan.stages])
    estimates = plan_memory(plan, WORKLOAD)
    assert [estimate.node for estimate in estimates] == list(plan.nodes)
    for estimate in estimates:
        need = needs[plan.stage_of[estimate.node]]
        # Some task runs while the most microbatches are held: the first of them that makes the number.
        assert estimate.held == timeline.peak_memory[estimate.node]
        assert estimate.activation_bytes == estimate.held * need.resident_bytes
        assert estimate.working_bytes == (need.working_bytes if estimate.held else 0)
        assert 0 <= estimate.message_bytes <= 2 * len(plan.microbatches) * WORKLOAD.activation_bytes
        writer = plan.stages[estimate.stage].nodes[0] == estimate.node
        assert estimate.copy_bytes == (need.copy_bytes if writer else 0)
        assert estimate.total_bytes == (
            estimate.state_bytes
            + estimate.copy_bytes
            + estimate.activation_bytes
            + estimate.working_bytes
            + estimate.message_bytes
        )
        # What the planner lets a node hold, it has room for.
        limit_bytes = need.fixed_bytes + estimate.held * need.resident_bytes
        assert need.held(limit_bytes) == estimate.held


def relaying_plan() -> Plan:
    """Return a plan of three nodes in which the second one only passes a microbatch on."""
    drawn = random_plan(1, num_nodes=3, num_stages=3, route_length=3, num_microbatches=1)
    first, second, third = nodes = drawn.nodes
    order = {first: "F L B", second: "RF RB", third: "F B"}
    changed = {
        "stages": tuple(PlanStage(layers=(index, index + 1), nodes=(node,)) for index, node in enumerate(nodes)),
        "microbatches": (Route(id=0, route=(first, third), path=nodes),),
        "order": {node: tuple(Task(name, 0) for name in names.split()) for node, names in order.items()},  # type: ignore[arg-type]
        "rules": Rules(num_stages=3, route_length=2, uniform_coverage=False),
    }
    return with_exact_times(drawn.model_copy(update=changed))


def test_a_relay_has_room_for_the_message_and_for_nothing_else() -> None:
    plan = relaying_plan()
    relay = plan_memory(plan, WORKLOAD)[1]
    assert (relay.held, relay.activation_bytes, relay.working_bytes) == (0, 0, 0)
    assert relay.message_bytes == WORKLOAD.activation_bytes
    assert relay.total_bytes == relay.state_bytes + relay.copy_bytes + relay.message_bytes


def test_stages_that_only_relay_take_nothing_of_the_one_process() -> None:
    assert memory_of_one_process(relaying_plan(), WORKLOAD).activation_bytes == 2 * (100 + 30) + 20


def test_one_process_holds_one_microbatch_in_all_its_stages() -> None:
    plan = random_plan(1, num_stages=4, route_length=3)
    estimate = memory_of_one_process(plan, WORKLOAD)
    assert estimate.state_bytes == 4 * 10_000 + 100_000
    assert estimate.activation_bytes == 3 * (100 + 30) + 20
    assert estimate.working_bytes == 900


def test_node_that_is_too_small_is_refused_with_every_part() -> None:
    plan = random_plan(1, layers_per_stage=2)
    estimates = plan_memory(plan, WORKLOAD)
    origin = next(estimate for estimate in estimates if estimate.stage == 0 and estimate.copy_bytes)
    check_memory(estimates, {estimate.node: estimate.total_bytes for estimate in estimates})
    with pytest.raises(InfeasibleError) as caught:
        check_memory(estimates, {origin.node: origin.total_bytes - 1})
    message = str(caught.value)
    assert message.startswith(f"node {origin.node!r} (stage 0) has ")
    for part in ("weights, gradients and optimizer state", "checkpoint copy", "microbatch", "work of a task"):
        assert part in message
    assert "raise its memory_gib, give the stage fewer layers" in message
    assert caught.value.exit_code == 3
