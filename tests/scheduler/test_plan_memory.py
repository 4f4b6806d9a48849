"""The peak of every node of a plan, against a count by hand and against what the planner allows."""

import pytest
from hypothesis import given, settings, strategies as st
from random_plans import random_plan

from skippipe_scheduler.errors import InfeasibleError
from skippipe_scheduler.plan.plan_memory import check_memory, memory_of_one_process, plan_memory
from skippipe_scheduler.plan.simulate import simulate
from skippipe_scheduler.problem.memory import stage_needs
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


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_peaks_of_random_plans(seed: int) -> None:
    plan = random_plan(seed)
    timeline = simulate(plan)
    needs = stage_needs(WORKLOAD, plan.layers_per_stage, [len(stage.nodes) for stage in plan.stages])
    estimates = plan_memory(plan, WORKLOAD)
    assert [one.node for one in estimates] == list(plan.nodes)
    for one in estimates:
        need = needs[plan.stage_of[one.node]]
        # Some task runs while the most microbatches are held: the first of them that makes the number.
        assert one.held == timeline.peak_memory[one.node]
        assert one.activation_bytes == one.held * need.resident_bytes
        assert one.working_bytes == (need.working_bytes if one.held else 0)
        assert 0 <= one.message_bytes <= 2 * len(plan.microbatches) * WORKLOAD.activation_bytes
        writer = plan.stages[one.stage].nodes[0] == one.node
        assert one.copy_bytes == (need.copy_bytes if writer else 0)
        assert one.total_bytes == (
            one.state_bytes + one.copy_bytes + one.activation_bytes + one.working_bytes + one.message_bytes
        )
        # What the planner lets a node hold, it has room for.
        limit_bytes = need.fixed_bytes + one.held * need.resident_bytes
        assert need.held(limit_bytes) == one.held


def test_one_process_holds_one_microbatch_in_all_its_stages() -> None:
    plan = random_plan(1, num_stages=4, route_length=3)
    estimate = memory_of_one_process(plan, WORKLOAD)
    assert estimate.state_bytes == 4 * 10_000 + 100_000
    assert estimate.activation_bytes == 3 * (100 + 30) + 20
    assert estimate.working_bytes == 900


def test_node_that_is_too_small_is_refused_with_every_part() -> None:
    plan = random_plan(1)
    estimates = plan_memory(plan, WORKLOAD)
    origin = next(one for one in estimates if one.stage == 0 and one.copy_bytes)
    check_memory(estimates, {one.node: one.total_bytes for one in estimates})
    with pytest.raises(InfeasibleError) as caught:
        check_memory(estimates, {origin.node: origin.total_bytes - 1})
    message = str(caught.value)
    assert message.startswith(f"node {origin.node!r} (stage 0) has ")
    for part in ("weights, gradients and optimizer state", "checkpoint copy", "microbatch", "work of a task"):
        assert part in message
    assert "raise its memory_gib, give the stage fewer layers" in message
    assert caught.value.exit_code == 3
