"""The exact simulator against closed forms and hand-made cases."""

import itertools
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from random_plans import random_plan

from skippipe_scheduler.analysis.chrome_trace import to_chrome_trace
from skippipe_scheduler.errors import DeadlockError, PlanError
from skippipe_scheduler.plan.plan import Operation, Plan, Task
from skippipe_scheduler.plan.simulate import (
    Timeline,
    TransferSpan,
    peak_held,
    simulate,
    simulate_order,
)
from skippipe_scheduler.problem.costs import Costs
from skippipe_scheduler.problem.sharing.contention import Contention

LINE = ("a", "b", "c")
RELAYS = pytest.mark.parametrize("relays", [0.0, 0.5])


def costs(contention: Contention = "none", transfer_s: float = 0.5, overhead_s: float = 0.0) -> Costs:
    pairs = {source: {other: transfer_s for other in LINE if other != source} for source in LINE}
    latency = {source: dict.fromkeys(pairs[source], transfer_s - 0.4) for source in LINE}
    bandwidth = {source: dict.fromkeys(pairs[source], 8e-9 / 0.4) for source in LINE}
    return Costs(
        forward_s=dict.fromkeys(LINE, 1.0),
        backward_s=dict.fromkeys(LINE, 2.0),
        loss_s=dict.fromkeys(LINE, 0.25),
        task_overhead_s=overhead_s,
        transfer_s=pairs,
        memory=dict.fromkeys(LINE, 9),
        contention=contention,
        activation_bytes=1,
        latency_s=latency,
        gbit_per_s=bandwidth,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"slowdown": {"node-99": 2.0}}, "slowdown: the plan has no node 'node-99'"),
        ({"lost_s": {"node-99": 0.0}}, "lost_s: the plan has no node 'node-99'"),
        ({"jitter_sigma": -1.0}, "jitter_sigma: -1"),
    ],
)
def test_what_the_plan_does_not_have_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        simulate(random_plan(1), **arguments)


def tasks(text: str) -> list[Task]:
    return [Task(part.rstrip("0123456789"), int(part.lstrip("RFLBW"))) for part in text.split()]  # type: ignore[arg-type]


def test_one_microbatch_on_a_line_is_the_sum_of_its_parts() -> None:
    order = {"a": tasks("F0 L0 B0"), "b": tasks("F0 B0"), "c": tasks("F0 B0")}
    timeline = simulate_order([LINE], order, costs())
    assert timeline.pipeline_s == pytest.approx(3 * 1 + 0.25 + 3 * 2 + 6 * 0.5)
    assert len(timeline.transfers) == 6
    assert timeline.busy_s == {"a": 3.25, "b": 3.0, "c": 3.0}
    assert timeline.peak_memory == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_full_pipeline_is_paced_by_its_slowest_node(count: int) -> None:
    forwards = " ".join(f"F{index}" for index in range(count))
    losses = " ".join(f"L{index}" for index in range(count))
    backwards = " ".join(f"B{index}" for index in range(count))
    order = {"a": tasks(f"{forwards} {losses} {backwards}"), "b": tasks(f"{forwards} {backwards}")}
    timeline = simulate_order([("a", "b")] * count, order, costs(transfer_s=0.5))
    waits_for_forwards = max(count * 1.0, 0)  # forwards of b end at count + 1 + 0.5, losses follow each
    last_loss = waits_for_forwards + 1 + 0.5 + 0.5 + 0.25
    assert timeline.pipeline_s >= last_loss + 2 + 0.5 + 2
    b_ends = max(timeline.tasks, key=lambda span: (span.node == "b", span.end_s)).end_s
    assert timeline.pipeline_s == pytest.approx(b_ends + 0.5 + 2)


def test_overhead_occupies_the_node_but_not_the_transfer() -> None:
    order = {"a": tasks("F0 F1 L0 L1 B0 B1"), "b": tasks("F0 F1 B0 B1")}
    timeline = simulate_order([("a", "b")] * 2, order, costs(overhead_s=0.1))
    start = {(span.node, span.operation, span.microbatch): span.start_s for span in timeline.tasks}
    assert start["a", "F", 1] == pytest.approx(1.1)
    assert start["b", "F", 0] == pytest.approx(1.5)


def test_messages_queue_on_a_shared_link() -> None:
    slow = costs("link", transfer_s=0.5)
    fast_origin = slow.model_copy(update={"forward_s": {"a": 0.1, "b": 0.1, "c": 0.1}})
    order = {"a": tasks("F0 F1 L0 L1 B0 B1"), "b": tasks("F0 F1 B0 B1")}
    arrivals = [
        span.end_s
        for span in simulate_order([("a", "b")] * 2, order, fast_origin).transfers
        if (span.source, span.direction, span.hop) == ("a", "forward", 0)
    ]
    assert arrivals == pytest.approx([0.1 + 0.5, 0.1 + 0.4 + 0.5])  # the second waits 0.3 s for the link


def test_messages_share_a_network_card_only_with_node_contention() -> None:
    routes = [("a", "b"), ("a", "c")]
    order = {"a": tasks("F0 F1 L0 L1 B0 B1"), "b": tasks("F0 B0"), "c": tasks("F1 B1")}

    def second_arrival(contention: Contention) -> float:
        fast = costs(contention).model_copy(update={"forward_s": dict.fromkeys(LINE, 0.1)})
        return next(span.end_s for span in simulate_order(routes, order, fast).transfers if span.destination == "c")

    assert second_arrival("link") == pytest.approx(0.2 + 0.5)
    assert second_arrival("node") == pytest.approx(0.1 + 0.4 + 0.5)


def test_deadlock_is_named() -> None:
    routes = [("a", "b", "c"), ("a", "c", "b")]
    order = {"a": tasks("F0 F1 L0 L1 B0 B1"), "b": tasks("F1 F0 B0 B1"), "c": tasks("F0 F1 B0 B1")}
    with pytest.raises(DeadlockError, match="b waits for the input of the forward of microbatch 1"):
        simulate_order(routes, order, costs())


def test_reduction_starts_with_the_last_backward_of_its_stage() -> None:
    order = {"a": tasks("F0 L0 B0"), "b": tasks("F0 B0"), "c": tasks("")}
    timeline = simulate_order([("a", "b")], order, costs(), stages=[["a"], ["b", "c"]], reduce_s=[0.5, 9.0])
    b_end = next(span.end_s for span in timeline.tasks if (span.node, span.operation) == ("b", "B"))
    assert timeline.reductions[1].start_s == b_end
    assert timeline.iteration_s == b_end + 9.0
    assert timeline.reduce_exposed_s == pytest.approx(timeline.iteration_s - timeline.pipeline_s)


@pytest.mark.parametrize(
    ("order", "peak"), [("F0 B0 F1 B1", 1), ("F0 F1 B0 F2 B1 B2", 2), ("F0 F1 F2 B0 B1 B2", 3), ("", 0)]
)
def test_memory_peak_by_hand(order: str, peak: int) -> None:
    assert peak_held(tasks(order)) == peak


@RELAYS
@given(seed=st.integers(0, 10_000), contention=st.sampled_from(["none", "link", "node", "shared"]))
@settings(max_examples=60)
def test_spans_obey_every_rule_of_time(relays: float, seed: int, contention: Contention) -> None:
    plan = random_plan(seed, contention=contention, relays=relays)
    timeline = simulate(plan)
    assert len(timeline.tasks) == sum(len(entries) for entries in plan.order.values())
    for node, entries in plan.order.items():
        spans = sorted((span for span in timeline.tasks if span.node == node), key=lambda span: span.start_s)
        assert [(span.operation, span.microbatch) for span in spans] == list(entries)
        for before, after in itertools.pairwise(spans):
            assert after.start_s >= before.end_s + plan.costs.task_overhead_s - 1e-9
    ends = {(span.node, span.operation, span.microbatch): span for span in timeline.tasks}
    for transfer in timeline.transfers:
        assert transfer.start_s >= transfer.ready_s
        alone_s = plan.costs.transfer_s[transfer.source][transfer.destination]
        if contention == "shared":
            assert transfer.end_s >= transfer.start_s + alone_s - 1e-9
        else:
            assert transfer.end_s == pytest.approx(transfer.start_s + alone_s)
        operations: tuple[Operation, ...] = ("F", "L", "RF") if transfer.direction == "forward" else ("B", "RB")
        receivers = [ends.get((transfer.destination, operation, transfer.microbatch)) for operation in operations]
        assert any(receiver is not None and receiver.start_s >= transfer.end_s - 1e-9 for receiver in receivers)


@RELAYS
@given(seed=st.integers(0, 1000))
@settings(max_examples=20)
def test_contention_only_delays(relays: float, seed: int) -> None:
    free, link, node = (
        simulate(random_plan(seed, contention=contention, relays=relays)).pipeline_s
        for contention in ("none", "link", "node")
    )
    assert free <= link + 1e-9
    assert free <= node + 1e-9


def test_jitter_is_seeded_and_slow_nodes_cost_time() -> None:
    plan = random_plan(1)
    nominal = simulate(plan).iteration_s
    assert simulate(plan, jitter_sigma=0.5, seed=3) == simulate(plan, jitter_sigma=0.5, seed=3)
    assert simulate(plan, jitter_sigma=0.5, seed=3).iteration_s != nominal
    assert simulate(plan, slowdown=dict.fromkeys(plan.nodes, 2.0)).iteration_s > nominal


@RELAYS
def test_trace_holds_every_span(relays: float) -> None:
    plan = random_plan(2, contention="node", relays=relays)
    timeline = simulate(plan)
    events = json.loads(json.dumps(to_chrome_trace(timeline)))["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    threads = {
        (event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == "thread_name"
    }
    shown = sorted(
        (names[event["pid"]], threads[event["pid"], event["tid"]], event["ts"])
        for event in events
        if event["ph"] == "X"
    )
    reductions = [span for span in timeline.reductions if span.end_s > span.start_s]
    expected = [
        *((span.node, "tasks", span.start_s * 1e6) for span in timeline.tasks),
        *((span.source, f"transfers to {span.destination}", span.start_s * 1e6) for span in timeline.transfers),
        *(("gradient reductions", f"stage {span.stage}", span.start_s * 1e6) for span in reductions),
    ]
    assert reductions
    assert shown == sorted(expected)


@RELAYS
def test_bars_of_one_trace_thread_never_overlap(relays: float) -> None:
    timeline = simulate(random_plan(2, num_nodes=4, num_microbatches=12, contention="link", relays=relays))
    events = [event for event in to_chrome_trace(timeline)["traceEvents"] if event["ph"] == "X"]

    def lane(event: dict[str, Any]) -> tuple[int, int]:
        return event["pid"], event["tid"]

    for _, bars in itertools.groupby(sorted(events, key=lambda event: (*lane(event), event["ts"])), key=lane):
        for before, after in itertools.pairwise(bars):
            assert before["ts"] + before["dur"] <= after["ts"] * (1 + 1e-12)


@RELAYS
def test_trace_counts_the_microbatches_held(relays: float) -> None:
    plan = random_plan(2, relays=relays)
    timeline = simulate(plan)
    counters = [event for event in to_chrome_trace(timeline)["traceEvents"] if event["ph"] == "C"]
    for rank, node in enumerate(timeline.busy_s):
        held = [event["args"]["held"] for event in counters if event["pid"] == rank]
        assert max(held, default=0) == peak_held(plan.order[node])


def test_trace_shows_a_task_that_was_cut_off() -> None:
    plan = random_plan(2)
    first = simulate(plan).tasks[0]
    timeline = simulate(plan, lost_s={first.node: (first.start_s + first.end_s) / 2})
    names = [event["name"] for event in to_chrome_trace(timeline)["traceEvents"]]
    assert f"forward {first.microbatch} (cut off)" in names


def test_a_million_tasks_a_minute() -> None:
    """In processor time, the best of five, as tests share their machine; an ordinary core does four times as many."""
    plan = random_plan(0, num_nodes=12, num_microbatches=600, contention="node")
    speeds = []
    for _ in range(5):
        started_s = time.process_time()
        count = len(simulate(plan).tasks)
        speeds.append(count / (time.process_time() - started_s))
    assert max(speeds) > 1e6 / 60


def arrivals_s(routes: list[tuple[str, ...]], order: dict[str, list[Task]], contention: Contention) -> list[float]:
    """Arrival of the first hop of every microbatch where a forward takes 0.1 s."""
    fast = costs(contention).model_copy(update={"forward_s": dict.fromkeys(LINE, 0.1)})
    spans = simulate_order(routes, order, fast).transfers
    first = sorted((span.microbatch, span.end_s) for span in spans if (span.hop, span.direction) == (0, "forward"))
    return [end_s for _, end_s in first]


def test_an_incoming_card_takes_one_transfer_at_a_time_the_lower_microbatch_first() -> None:
    routes: list[tuple[str, ...]] = [("a", "c"), ("b", "c")]
    order = {"a": tasks("F0 L0 B0"), "b": tasks("F1 L1 B1"), "c": tasks("F0 F1 B0 B1")}
    assert arrivals_s(routes, order, "link") == pytest.approx([0.6, 0.6])
    assert arrivals_s(routes, order, "node") == pytest.approx([0.6, 1.0])


def test_a_card_sends_and_receives_at_once() -> None:
    routes: list[tuple[str, ...]] = [("a", "b"), ("b", "a")]
    order = {"a": tasks("F0 F1 L0 B1 B0"), "b": tasks("F1 F0 L1 B0 B1")}
    assert arrivals_s(routes, order, "node") == pytest.approx([0.6, 0.6])


def test_bubble_by_hand() -> None:
    timeline = simulate_order([("a", "b")], {"a": tasks("F0 L0 B0"), "b": tasks("F0 B0")}, costs())
    assert timeline.iteration_s == pytest.approx(8.25)
    assert timeline.bubble_fraction == pytest.approx(1 - (3.25 + 3.0) / (2 * 8.25))


def test_a_deadlock_of_many_names_three() -> None:
    route = ("a", "b", "c", "d", "e")
    order = {"a": tasks("B0"), **{node: tasks("F0") for node in route[1:]}}
    with pytest.raises(DeadlockError, match=r"a waits [^;]*; b waits [^;]*; c waits [^;]* and 2 more$"):
        simulate_order([route], order, costs())


def ends_by_the_rules(plan: Plan, transfer: TransferSpan) -> tuple[Operation, Operation]:
    """What a transfer's source has done and its destination does next, by their places on the path."""
    microbatch = plan.microbatches[transfer.microbatch]
    last = transfer.hop == len(microbatch.whole_path) - 1
    made: Operation = "F" if transfer.direction == "forward" else "L" if last else "B"
    used: Operation = "B" if transfer.direction == "backward" else "L" if last else "F"
    relay: Operation = "RF" if transfer.direction == "forward" else "RB"
    relays = microbatch.relays
    return relay if transfer.source in relays else made, relay if transfer.destination in relays else used


@RELAYS
@given(seed=st.integers(0, 10_000), contention=st.sampled_from(["none", "link", "node", "shared"]))
@settings(max_examples=40)
def test_nothing_waits_without_a_reason(relays: float, seed: int, contention: Contention) -> None:
    """A transfer is ready when its task ends; a task starts as soon as its node is free and its input is there."""
    plan = random_plan(seed, contention=contention, relays=relays)
    timeline = simulate(plan)
    spans = {(span.node, span.operation, span.microbatch): span for span in timeline.tasks}
    arrival_s = {}
    for transfer in timeline.transfers:
        made, used = ends_by_the_rules(plan, transfer)
        assert (transfer.maker, transfer.user) == (made, used)
        assert transfer.ready_s == spans[transfer.source, made, transfer.microbatch].end_s
        assert contention != "none" or transfer.start_s == transfer.ready_s
        arrival_s[transfer.destination, used, transfer.microbatch] = transfer.end_s
    for node, entries in plan.order.items():
        free_s = 0.0
        for task in entries:
            span = spans[node, task.operation, task.microbatch]
            assert span.start_s == max(free_s, arrival_s.get((node, *task), 0.0))
            free_s = span.end_s + plan.costs.task_overhead_s


def test_jitter_reaches_every_task_and_transfer() -> None:
    plan = random_plan(1)
    exact, jittered = simulate(plan), simulate(plan, jitter_sigma=0.5)
    usual_s = {(span.node, *span[1:4]): span.end_s - span.start_s for span in exact.tasks}
    for task in jittered.tasks:
        assert task.end_s - task.start_s != pytest.approx(usual_s[task.node, *task[1:4]], rel=1e-9)
    for transfer in jittered.transfers:
        usual = plan.costs.transfer_s[transfer.source][transfer.destination]
        assert transfer.end_s - transfer.start_s != pytest.approx(usual, rel=1e-9)


RELAYED = {"a": tasks("F0 L0 B0"), "b": tasks("RF0 RB0"), "c": tasks("F0 B0")}


def starts_s(timeline: Timeline) -> dict[str, float]:
    """Start of every task, by its node, operation and microbatch in one word."""
    return {f"{span.node} {span.operation}{span.microbatch}": span.start_s for span in timeline.tasks}


def test_a_relay_costs_a_transfer_each_way_and_no_work() -> None:
    timeline = simulate_order([("a", "b", "c")], RELAYED, costs())
    assert starts_s(timeline) == pytest.approx(
        {
            **{"a F0": 0, "b RF0": 1.5, "c F0": 2.0, "a L0": 3.5},
            **{"c B0": 4.25, "b RB0": 6.75, "a B0": 7.25},
        }
    )
    assert timeline.pipeline_s == pytest.approx(9.25)
    assert (timeline.busy_s["b"], timeline.peak_memory["b"]) == (0.0, 0)
    assert [(span.source, span.destination, span.maker, span.user) for span in timeline.transfers] == [
        ("a", "b", "F", "RF"),
        ("b", "c", "RF", "F"),
        ("c", "a", "F", "L"),
        ("a", "c", "L", "B"),
        ("c", "b", "B", "RB"),
        ("b", "a", "RB", "B"),
    ]


def test_a_relay_behind_the_last_node_passes_on_to_the_loss() -> None:
    timeline = simulate_order([("a", "c", "b")], RELAYED, costs())
    assert starts_s(timeline) == pytest.approx(
        {
            **{"a F0": 0, "c F0": 1.5, "b RF0": 3.0, "a L0": 3.5},
            **{"b RB0": 4.25, "c B0": 4.75, "a B0": 7.25},
        }
    )
    assert [(span.maker, span.user) for span in timeline.transfers if "b" in (span.source, span.destination)] == [
        ("F", "RF"),
        ("RF", "L"),
        ("L", "RB"),
        ("RB", "B"),
    ]


def test_a_relay_waits_for_its_turn_and_holds_up_what_stands_behind_it() -> None:
    """Its message is there at 1.5, but the node has a forward before it, until 3.6; overhead follows both."""
    order = {
        "a": tasks("F0 F1 F2 L0 L1 L2 B0 B1 B2"),
        "b": tasks("F1 RF0 F2 B1 B2 RB0"),
        "c": tasks("F0 B0"),
    }
    found = starts_s(simulate_order([("a", "b", "c"), ("a", "b"), ("a", "b")], order, costs(overhead_s=0.1)))
    assert [found["b F1"], found["b RF0"], found["b F2"], found["c F0"]] == pytest.approx([2.6, 3.7, 3.8, 4.2])


@pytest.mark.parametrize(("contention", "through_b", "direct"), [("link", 1.1, 0.7), ("node", 1.4, 1.0)])
def test_messages_of_a_relay_queue_like_others(contention: Contention, through_b: float, direct: float) -> None:
    """Two go to c at once, one by way of b: with "node" they meet at the card of a, and at that of c."""
    order = {"a": tasks("F0 F1 L0 L1 B0 B1"), "b": tasks("RF0 RB0"), "c": tasks("F1 F0 B1 B0")}
    fast = costs(contention).model_copy(update={"forward_s": dict.fromkeys(LINE, 0.1)})
    spans = simulate_order([("a", "b", "c"), ("a", "c")], order, fast).transfers
    arrivals = {span.microbatch: span.end_s for span in spans if (span.destination, span.user) == ("c", "F")}
    assert arrivals == pytest.approx({0: through_b, 1: direct})


@pytest.mark.parametrize(
    ("lost_s", "ran"),
    [
        (1.2, ["a F0"]),  # on its way to the relay
        (1.6, ["a F0", "b RF0"]),  # on its way from there
        (2.5, ["a F0", "b RF0", "c F0", "a L0", "c B0"]),  # the gradient finds nobody
    ],
)
def test_what_goes_through_a_lost_relay_stops_there(lost_s: float, ran: list[str]) -> None:
    assert list(starts_s(simulate_order([("a", "b", "c")], RELAYED, costs(), lost_s={"b": lost_s}))) == ran


def test_a_relay_that_waits_for_ever_is_named() -> None:
    order = RELAYED | {"b": tasks("RB0 RF0")}
    with pytest.raises(DeadlockError, match="b waits for the input of the backward relay of microbatch 0"):
        simulate_order([("a", "b", "c")], order, costs())
