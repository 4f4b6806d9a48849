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


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.7]))
@settings(max_examples=40)
def test_peaks_of_random_plans(seed: int, split: float) -> None:
    plan = random_plan(seed, split=split)
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
