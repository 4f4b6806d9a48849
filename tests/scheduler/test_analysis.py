"""Where the time of nodes and links goes."""

import pytest
from hypothesis import given, settings, strategies as st
from random_plans import random_plan

from skippipe_scheduler.analysis.usage import LOAD_PARTS, analyse, held_over_time, load_over_time
from skippipe_scheduler.plan.plan import Operation
from skippipe_scheduler.plan.simulate import TaskSpan, peak_held, simulate
from skippipe_scheduler.problem.sharing.contention import Contention

RELAYS = pytest.mark.parametrize("relays", [0.0, 0.5])


def span(operation: Operation, microbatch: int, start_s: float, end_s: float) -> TaskSpan:
    return TaskSpan("a", operation, microbatch, 0, start_s, end_s)


@RELAYS
@given(
    seed=st.integers(0, 10_000),
    contention=st.sampled_from(["none", "link", "node", "shared"]),
    jitter_sigma=st.sampled_from([0.0, 0.5]),
)
@settings(max_examples=100)
def test_the_parts_of_a_node_add_up_to_the_iteration(
    relays: float, seed: int, contention: Contention, jitter_sigma: float
) -> None:
    plan = random_plan(seed, contention=contention, relays=relays)
    timeline = simulate(plan, jitter_sigma=jitter_sigma, seed=seed)
    analysis = analyse(plan, timeline)
    assert [node.node for node in analysis.nodes] == list(plan.nodes)
    for node in analysis.nodes:
        parts = (node.overhead_s, node.exposed_communication_s, node.waiting_s, node.reduction_s, node.ending_s)
        assert node.busy_s + sum(parts) == pytest.approx(timeline.iteration_s)
        assert min(parts) >= -1e-9
        assert 0 <= node.exposed_queueing_s <= node.exposed_communication_s + 1e-9
        assert max(held for _, held in node.held) == node.peak_held == peak_held(plan.order[node.node])
        assert node.held[-1][1] == 0
        assert sum(node.load) * timeline.iteration_s / LOAD_PARTS == pytest.approx(node.busy_s)


@RELAYS
@given(seed=st.integers(0, 10_000), contention=st.sampled_from(["none", "link", "node", "shared"]))
@settings(max_examples=40)
def test_links_carry_every_transfer_and_are_never_overfull(relays: float, seed: int, contention: Contention) -> None:
    plan = random_plan(seed, contention=contention, relays=relays)
    timeline = simulate(plan)
    analysis = analyse(plan, timeline)
    assert sum(link.num_transfers for link in analysis.links) == len(timeline.transfers)
    assert sum(link.num_bytes or 0 for link in analysis.links) == 1_000_000 * len(timeline.transfers)
    queued_s = sum(transfer.start_s - transfer.ready_s for transfer in timeline.transfers)
    assert sum(link.queued_s for link in analysis.links) == pytest.approx(queued_s)
    for link in analysis.links:
        alone_s = link.num_transfers * 1e6 * 8e-9 / (plan.costs.gbit_per_s or {})[link.source][link.destination]
        if contention == "shared":
            assert link.occupied_s >= alone_s * (1 - 1e-9)
        else:
            assert link.occupied_s == pytest.approx(alone_s)
        assert contention == "none" or link.occupancy <= 1
        assert link.longest_queue_s <= link.queued_s + 1e-9


def test_without_a_bandwidth_a_link_is_occupied_until_the_transfer_arrives() -> None:
    plan = random_plan(4)
    bare = plan.costs.model_copy(update={"activation_bytes": None, "gbit_per_s": None, "latency_s": None})
    link = analyse(plan.model_copy(update={"costs": bare})).links[0]
    assert link.num_bytes is None
    assert link.occupied_s == pytest.approx(link.num_transfers * bare.transfer_s[link.source][link.destination])


def test_idle_time_by_hand() -> None:
    """One microbatch over three nodes: the second waits for the first's forward, then for the transfer."""
    plan = random_plan(0, num_nodes=3, num_stages=3, route_length=3, num_microbatches=1)
    route, costs = plan.microbatches[0].route, plan.costs
    second = next(node for node in analyse(plan).nodes if node.node == route[1])
    waits_before = costs.forward_s[route[0]]
    other_work_s = costs.forward_s[route[2]] + costs.loss_s[route[0]] + costs.backward_s[route[2]]
    hops = [(0, 1), (1, 2), (2, 0), (0, 2), (2, 1)]
    sent_s = [costs.transfer_s[route[a]][route[b]] for a, b in hops]
    assert second.exposed_communication_s == pytest.approx(sent_s[0] + sent_s[4])
    expected_s = waits_before + sum(sent_s[1:4]) + other_work_s - costs.task_overhead_s
    assert second.waiting_s == pytest.approx(expected_s)
    assert second.overhead_s == pytest.approx(costs.task_overhead_s)


def test_held_is_a_step_series() -> None:
    tasks = [span("F", 0, 0.0, 1.0), span("F", 1, 1.5, 2.0), span("L", 0, 2.0, 2.5), span("B", 0, 3.0, 5.0)]
    assert held_over_time(tasks) == ((0.0, 0), (0.0, 1), (1.5, 2), (5.0, 1))


def test_load_by_hand() -> None:
    tasks = [span("F", 0, 0.0, 1.5), span("B", 0, 3.0, 4.0)]
    assert load_over_time(tasks, 4.0, parts=4) == pytest.approx((1.0, 0.5, 0.0, 1.0))
    assert load_over_time([], 0.0, parts=2) == (0.0, 0.0)
