"""Nodes that are lost in the middle of an iteration, and iterations under jitter."""

import pytest
from hypothesis import given, settings, strategies as st
from random_plans import random_plan

from skippipe_scheduler.analysis.jitter import sample_iterations, summarise
from skippipe_scheduler.analysis.node_loss import simulate_loss
from skippipe_scheduler.plan.simulate import simulate
from skippipe_scheduler.problem.sharing.contention import Contention

CONTENTIONS = st.sampled_from(["none", "link", "node", "shared"])
RELAYS = pytest.mark.parametrize("relays", [0.0, 0.5])


@RELAYS
@given(seed=st.integers(0, 10_000), contention=CONTENTIONS, share=st.floats(0, 1))
@settings(max_examples=60)
def test_what_happened_before_the_loss_stays(relays: float, seed: int, contention: Contention, share: float) -> None:
    plan = random_plan(seed, contention=contention, relays=relays)
    whole = simulate(plan)
    lost, second = plan.nodes[seed % len(plan.nodes)], share * whole.iteration_s
    loss = simulate_loss(plan, {lost: second})
    early = {task for task in whole.tasks if task.end_s <= second}
    assert early <= set(loss.timeline.tasks)
    assert all(task.end_s <= second for task in loss.timeline.tasks if task.node == lost)
    assert all(task.end_s == second and task.start_s < second for task in loss.timeline.cut)
    for transfer in loss.timeline.transfers:
        assert transfer.end_s <= second or lost not in (transfer.source, transfer.destination)


@RELAYS
@given(seed=st.integers(0, 10_000), contention=CONTENTIONS, share=st.floats(0, 1))
@settings(max_examples=60)
def test_the_account_of_a_loss_is_complete(relays: float, seed: int, contention: Contention, share: float) -> None:
    plan = random_plan(seed, contention=contention, relays=relays)
    lost = plan.nodes[seed % len(plan.nodes)]
    loss = simulate_loss(plan, {lost: share * plan.predicted.iteration_s})
    ran = {(task.node, task.operation, task.microbatch) for task in loss.timeline.tasks}
    for microbatch in plan.microbatches:
        assert (microbatch.id in loss.unfinished) == ((microbatch.route[0], "B", microbatch.id) not in ran)
    assert sum(loss.open_tasks.values()) + len(ran) <= sum(len(tasks) for tasks in plan.order.values())
    everything = (*loss.timeline.tasks, *loss.timeline.cut)
    assert loss.done_s == pytest.approx(sum(task.end_s - task.start_s for task in everything))
    assert 0 <= loss.lost_work_s <= loss.done_s + 1e-9
    useful = [
        task for task in everything if task.microbatch not in loss.unfinished and (task.node != lost or loss.ended)
    ]
    assert loss.done_s - loss.lost_work_s == pytest.approx(sum(task.end_s - task.start_s for task in useful), abs=1e-9)
    assert lost not in loss.dry_s


def test_a_node_lost_at_once_runs_nothing_and_one_lost_before_the_reductions_costs_its_gradients() -> None:
    plan = random_plan(7)
    node = plan.microbatches[0].route[0]
    at_once = simulate_loss(plan, {node: 0.0})
    assert node not in {task.node for task in at_once.timeline.tasks}
    assert at_once.timeline.cut == ()
    late = simulate_loss(plan, {node: plan.predicted.pipeline_s})
    assert late.timeline.tasks == simulate(plan).tasks
    assert late.unfinished == ()
    assert late.lost_work_s == pytest.approx(simulate(plan).busy_s[node])
    assert set(late.open_tasks.values()) == {0}
    reduced = {span.stage for span in late.timeline.reductions}
    assert reduced == set(range(len(plan.stages))) - {plan.stage_of[node]}


def test_a_node_lost_after_the_end_costs_nothing() -> None:
    plan = random_plan(7)
    node = plan.microbatches[0].route[0]
    loss = simulate_loss(plan, {node: plan.predicted.iteration_s})
    assert (loss.ended, loss.lost_work_s, loss.unfinished) == (True, 0.0, ())
    assert loss.timeline == simulate(plan)


def test_a_loss_by_hand() -> None:
    """The only other node is lost during its forward: the origin has sent its activation and waits for ever."""
    plan = random_plan(1, num_nodes=2, num_stages=2, route_length=2, num_microbatches=1)
    origin, other = plan.microbatches[0].route
    forward_s = plan.costs.forward_s[origin]
    arrived_s = forward_s + plan.costs.transfer_s[origin][other]
    loss = simulate_loss(plan, {other: arrived_s + 0.1})
    assert loss.dry_s == {origin: pytest.approx(forward_s)}
    assert loss.open_tasks == {origin: 2}
    assert loss.unfinished == (0,)
    assert loss.lost_work_s == loss.done_s == pytest.approx(forward_s + 0.1)
    assert [(task.node, task.operation) for task in loss.timeline.cut] == [(other, "F")]
    assert loss.timeline.peak_memory == {origin: 1, other: 1}
    on_the_way = simulate_loss(plan, {other: arrived_s - 0.01})
    assert on_the_way.timeline.transfers == ()


@given(iterations_s=st.lists(st.floats(0.1, 100), min_size=1, max_size=60))
def test_percentiles_are_samples_in_order(iterations_s: list[float]) -> None:
    summary = summarise(tuple(iterations_s))
    assert summary.samples == len(iterations_s)
    assert min(iterations_s) <= summary.p50_s <= summary.p95_s <= summary.max_s == max(iterations_s)
    assert sum(iteration_s <= summary.p95_s for iteration_s in iterations_s) >= 0.95 * len(iterations_s)


def test_percentiles_by_hand() -> None:
    summary = summarise(tuple(float(second) for second in range(1, 101)))
    assert (summary.mean_s, summary.p50_s, summary.p95_s, summary.max_s) == (50.5, 50.0, 95.0, 100.0)


def test_samples_are_the_iterations_of_their_seeds() -> None:
    plan = random_plan(1)
    samples = sample_iterations(plan, 3, jitter_sigma=0.5, seed=4)
    assert samples == tuple(simulate(plan, jitter_sigma=0.5, seed=seed).iteration_s for seed in (4, 5, 6))
    assert len(set(samples)) == 3
