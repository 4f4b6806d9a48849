"""Backwards split into input and weight gradient: times, memory, rules, and every view of them."""

import json
import random

import pytest
from hypothesis import given, settings, strategies as st
from independent_checker import Content, first_offence_of, replay
from random_plans import random_plan, with_exact_times, with_splits
from test_simulate import costs, tasks

from skippipe_scheduler.analysis.chrome_trace import to_chrome_trace
from skippipe_scheduler.analysis.critical_path import critical_path
from skippipe_scheduler.analysis.node_loss import simulate_loss
from skippipe_scheduler.analysis.usage import analyse, held_over_time
from skippipe_scheduler.errors import DeadlockError, PlanError
from skippipe_scheduler.plan.plan import Plan, Task
from skippipe_scheduler.plan.simulate import peak_held, simulate, simulate_order
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.problem.costs import Costs

CONTENTIONS = st.sampled_from(["none", "link", "node", "shared"])


def with_weights(weight_s: float, overhead_s: float = 0.0) -> Costs:
    given = costs(overhead_s=overhead_s)
    return given.model_copy(update={"weight_s": dict.fromkeys(given.forward_s, weight_s)})


def random_split_plan(seed: int = 3) -> Plan:
    return random_plan(seed, split=0.6, contention="link", num_microbatches=8)


def content_of(plan: Plan) -> Content:
    content: Content = json.loads(plan.to_json())
    return content


def test_a_split_backward_passes_the_gradient_on_earlier() -> None:
    order = {"a": tasks("F0 L0 B0"), "b": tasks("F0 B0 W0"), "c": tasks("F0 B0 W0")}
    timeline = simulate_order([("a", "b", "c")], order, with_weights(0.75))
    whole_s = 3 * 1 + 0.25 + 3 * 2 + 6 * 0.5
    assert timeline.pipeline_s == pytest.approx(whole_s - 2 * 0.75)
    assert timeline.busy_s == {"a": 3.25, "b": 3.0, "c": 3.0}
    ends = {(span.node, span.operation): span.end_s for span in timeline.tasks}
    assert ends["c", "W"] == pytest.approx(ends["c", "B"] + 0.75)


def test_overhead_follows_each_half() -> None:
    order = {"a": tasks("F0 L0 B0"), "b": tasks("F0 B0 W0")}
    timeline = simulate_order([("a", "b")], order, with_weights(0.75, overhead_s=0.1))
    starts = {(span.node, span.operation): span.start_s for span in timeline.tasks}
    assert starts["b", "W"] == pytest.approx(starts["b", "B"] + 1.25 + 0.1)


def test_reduction_waits_for_the_last_weight_gradient() -> None:
    order = {"a": tasks("F0 L0 B0"), "b": tasks("F0 B0 W0")}
    timeline = simulate_order([("a", "b")], order, with_weights(0.75), stages=[("a",), ("b",)], reduce_s=(0.0, 9.0))
    last_s = next(span.end_s for span in timeline.tasks if span.operation == "W")
    assert timeline.reductions[1].start_s == last_s
    assert timeline.iteration_s == pytest.approx(last_s + 9.0)


def test_a_microbatch_is_held_until_its_weight_gradient_is_done() -> None:
    assert peak_held(tasks("F0 B0 F1 B1")) == 1
    assert peak_held(tasks("F0 B0 F1 W0 B1 W1")) == 2
    assert peak_held(tasks("F0 B0 W0 F1 B1")) == 1
    order = {"a": tasks("F0 F1 L0 B0 L1 B1"), "b": tasks("F0 B0 F1 W0 B1")}
    timeline = simulate_order([("a", "b")] * 2, order, with_weights(0.75))
    assert timeline.peak_memory["b"] == 2
    held = held_over_time([span for span in timeline.tasks if span.node == "b"])
    assert [count for _, count in held] == [0, 1, 2, 1, 0]


def test_a_weight_gradient_before_its_backward_deadlocks() -> None:
    order = {"a": tasks("F0 L0 B0"), "b": tasks("F0 W0 B0")}
    with pytest.raises(DeadlockError, match="b waits for the input of the weight gradient of microbatch 0"):
        simulate_order([("a", "b")], order, with_weights(0.75))


@pytest.mark.parametrize("relays", [0.0, 0.5])
@settings(max_examples=60)
@given(st.integers(0, 10_000), CONTENTIONS, st.integers(1, 3))
def test_random_split_plans_are_valid_for_both_checkers(relays: float, seed: int, contention: str, memory: int) -> None:
    plan = random_plan(seed, split=0.5, contention=contention, memory=memory, relays=relays)  # type: ignore[arg-type]
    validate(plan)
    content = content_of(plan)
    assert first_offence_of(content) is None
    spans = replay(content)
    assert spans is not None
    for span in simulate(plan).tasks:
        assert spans[span.node, span.operation, span.microbatch] == pytest.approx((span.start_s, span.end_s))


@pytest.mark.parametrize("relays", [0.0, 0.5])
@settings(max_examples=20)
@given(st.integers(0, 10_000), CONTENTIONS)
def test_analysis_and_critical_path_add_up(relays: float, seed: int, contention: str) -> None:
    plan = random_plan(seed, split=0.7, contention=contention, relays=relays)  # type: ignore[arg-type]
    analysis, path = analyse(plan), critical_path(plan)
    assert path.iteration_s == pytest.approx(analysis.iteration_s)
    assert sum(path.by_kind.values()) == pytest.approx(analysis.iteration_s)
    for node in analysis.nodes:
        parts = (node.overhead_s, node.exposed_communication_s, node.waiting_s, node.reduction_s, node.ending_s)
        assert node.busy_s + sum(parts) == pytest.approx(analysis.iteration_s)
        assert max(count for _, count in node.held) == node.peak_held


def test_trace_names_weight_gradients() -> None:
    plan = random_split_plan()
    names = [event["name"] for event in to_chrome_trace(simulate(plan))["traceEvents"]]
    assert sum(name.startswith("weight gradient ") for name in names) == sum(map(len, plan.split_of.values())) > 0


def test_a_microbatch_whose_weight_gradient_is_lost_is_unfinished() -> None:
    plan = random_split_plan()
    last = max((span for span in simulate(plan).tasks if span.operation == "W"), key=lambda span: span.end_s)
    assert last.microbatch in simulate_loss(plan, {last.node: last.start_s}).unfinished
    assert not simulate_loss(plan, {last.node: simulate(plan).iteration_s}).unfinished


def test_plans_without_a_split_are_written_as_before() -> None:
    plan = random_plan(3)
    assert "weight_s" not in plan.to_json()
    split = with_exact_times(with_splits(plan, 0.5, random.Random(0)))
    assert Plan.model_validate_json(split.to_json()) == split
    assert split.hash != plan.hash


def without_costs(content: Content) -> None:
    node = next(node for node, tasks in content["order"].items() if ["W", 0] in tasks)
    del content["costs"]["weight_s"][node]


def twice(content: Content) -> None:
    tasks_of_node = next(tasks for tasks in content["order"].values() if ["W", 0] in tasks)
    tasks_of_node.append(["W", 0])


def before_its_backward(content: Content) -> None:
    tasks_of_node = next(tasks for tasks in content["order"].values() if ["W", 0] in tasks)
    tasks_of_node.remove(["W", 0])
    tasks_of_node.insert(0, ["W", 0])


def at_the_origin(content: Content) -> None:
    content["order"][content["microbatches"][0]["route"][0]].append(["W", 0])


def off_the_route(content: Content) -> None:
    node = next(node for node in content["nodes"] if node not in content["microbatches"][0]["route"])
    content["order"][node].append(["W", 0])


def too_much_held(content: Content) -> None:
    content["costs"]["memory"] = dict.fromkeys(content["nodes"], 1)


def of_an_unknown_node(content: Content) -> None:
    content["costs"]["weight_s"]["nowhere"] = 0.1


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (without_costs, r"order\.node-\d: has the weight gradient of microbatch 0, but costs.weight_s has no entry"),
        (twice, "the weight gradient of microbatch 0 is listed twice"),
        (before_its_backward, "the weight gradient of microbatch 0 stands before its backward"),
        (at_the_origin, "the weight gradient of microbatch 0 does not belong there"),
        (off_the_route, "the weight gradient of microbatch 0 does not belong there"),
        (too_much_held, "microbatches at once, costs.memory allows 1"),
        (of_an_unknown_node, "costs.weight_s: unknown node 'nowhere'"),
    ],
)
def test_offences_are_named(damage, expected: str) -> None:  # type: ignore[no-untyped-def]
    content = content_of(random_plan(1, split=1.0, num_microbatches=8, memory=4))
    damage(content)
    assert first_offence_of(content) is not None
    with pytest.raises(PlanError, match=expected):
        validate(Plan.model_validate_json(json.dumps(content)))


def test_weight_gradients_are_less_than_the_backward() -> None:
    given = costs().model_dump()
    with pytest.raises(ValueError, match="weight_s of node 'a' is 2 s; it is a part of backward_s, 2 s, and must be"):
        Costs.model_validate(given | {"weight_s": {"a": 2.0}})


def test_order_of_tasks_is_free_behind_the_backward() -> None:
    plan = random_split_plan()
    for node, tasks_of_node in plan.order.items():
        for microbatch in plan.split_of[node]:
            assert tasks_of_node.index(Task("W", microbatch)) > tasks_of_node.index(Task("B", microbatch))
