"""The critical path: segments that touch, add up to the iteration, and really are what it waits for."""

import itertools

import pytest
from hypothesis import given, settings, strategies as st
from random_plans import random_plan, with_exact_times

from skippipe_scheduler.analysis.critical_path import CriticalPath, PathSegment, SegmentKind, critical_path
from skippipe_scheduler.analysis.explain import bottleneck, explain, path_summary
from skippipe_scheduler.plan.plan import Plan, PlanStage, Route, Task
from skippipe_scheduler.plan.simulate import simulate
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.problem.sharing.contention import Contention

CONTENTIONS = st.sampled_from(["none", "link", "node", "shared"])
RELAYS = pytest.mark.parametrize("relays", [0.0, 0.5])


def two_microbatches(contention: Contention) -> Plan:
    """Return a plan of two nodes whose two transfers leave 0.1 s apart, each 0.4 s on the wire and 0.1 s of latency."""
    drawn = random_plan(0, num_nodes=2, num_stages=2, route_length=2, num_microbatches=2)
    origin, other = (stage.nodes[0] for stage in drawn.stages)
    both = (origin, other)
    pairs = {origin: {other: 0.5}, other: {origin: 0.5}}
    costs = drawn.costs.model_copy(
        update={
            "forward_s": dict.fromkeys(both, 0.1),
            "backward_s": dict.fromkeys(both, 2.0),
            "loss_s": dict.fromkeys(both, 0.25),
            "task_overhead_s": 0.0,
            "transfer_s": pairs,
            "reduce_s": (0.0, 3.0),
            "contention": contention,
            "activation_bytes": 1,
            "latency_s": {origin: {other: 0.1}, other: {origin: 0.1}},
            "gbit_per_s": {origin: {other: 2e-8}, other: {origin: 2e-8}},
        }
    )
    order = {
        origin: tuple(Task(operation, m) for operation in "FLB" for m in (0, 1)),  # type: ignore[arg-type]
        other: tuple(Task(operation, m) for operation in "FB" for m in (0, 1)),  # type: ignore[arg-type]
    }
    changed = {
        "nodes": both,
        "stages": (PlanStage(layers=(0, 1), nodes=(origin,)), PlanStage(layers=(1, 2), nodes=(other,))),
        "microbatches": (Route(id=0, route=both), Route(id=1, route=both)),
        "order": order,
        "costs": costs,
        "rules": Rules(num_stages=2, route_length=2),
        "regions": ("here", "there"),
    }
    return with_exact_times(drawn.model_copy(update=changed))


def test_by_hand() -> None:
    plan = two_microbatches("link")
    path = critical_path(plan)
    origin, other = plan.nodes
    assert [(segment.kind, segment.place, segment.reason) for segment in path.segments] == [
        ("forward", origin, "start"),
        ("transfer", f"{origin} to {other}", "input"),
        ("forward", other, "input"),
        ("transfer", f"{other} to {origin}", "input"),
        ("loss", origin, "input"),
        ("transfer", f"{origin} to {other}", "input"),
        ("backward", other, "input"),
        ("backward", other, "node"),
        ("reduction", other, "reduction"),
    ]
    assert path.iteration_s == pytest.approx(0.1 + 0.5 + 0.1 + 0.5 + 0.25 + 0.5 + 2 + 2 + 3)
    assert path.by_kind == pytest.approx(
        {"backward": 4.0, "reduction": 3.0, "transfer": 1.5, "loss": 0.25, "forward": 0.2}
    )
    assert path.by_region(plan) == pytest.approx(
        {"there": 7.1, "here to there": 1.0, "there to here": 0.5, "here": 0.35}
    )


def test_a_queue_shows_the_transfer_that_is_in_the_way() -> None:
    plan = two_microbatches("link")
    quick = plan.costs.model_copy(update={"backward_s": dict.fromkeys(plan.nodes, 0.01), "reduce_s": (0.0, 0.0)})
    path = critical_path(plan.model_copy(update={"costs": quick}))
    queueing = [segment for segment in path.segments if segment.kind == "queueing"]
    assert [segment.duration_s for segment in queueing] == pytest.approx([0.4])
    assert queueing[0].microbatch == 0
    assert path.segments[path.segments.index(queueing[0]) + 1].reason == "link"


@RELAYS
@given(seed=st.integers(0, 10_000), contention=CONTENTIONS, jitter_sigma=st.sampled_from([0.0, 0.5]))
@settings(max_examples=100)
def test_pieces_touch_and_add_up(relays: float, seed: int, contention: Contention, jitter_sigma: float) -> None:
    plan = random_plan(seed, contention=contention, num_microbatches=8, relays=relays)
    timeline = simulate(plan, jitter_sigma=jitter_sigma, seed=seed)
    path = critical_path(plan, timeline)
    assert path.segments[0].start_s == 0.0
    assert path.segments[0].reason == "start"
    assert path.iteration_s == timeline.iteration_s
    for before, after in itertools.pairwise(path.segments):
        assert before.end_s == after.start_s
    for total_s in (path.by_kind, path.by_place):
        assert sum(total_s.values()) == pytest.approx(timeline.iteration_s)


@RELAYS
@given(seed=st.integers(0, 10_000))
@settings(max_examples=40)
def test_a_longer_task_on_the_path_makes_the_iteration_longer(relays: float, seed: int) -> None:
    """Without queues; with them a delay can also change who comes first, and help."""
    plan = random_plan(seed, relays=relays)
    path = critical_path(plan)
    node, longer_s = plan.nodes[seed % len(plan.nodes)], 0.01
    on_path = sum((segment.kind, segment.node) == ("forward", node) for segment in path.segments)
    forward_s = plan.costs.forward_s | {node: plan.costs.forward_s[node] + longer_s}
    slower = plan.model_copy(update={"costs": plan.costs.model_copy(update={"forward_s": forward_s})})
    assert simulate(slower).iteration_s >= path.iteration_s + on_path * longer_s - 1e-9


@RELAYS
@given(seed=st.integers(0, 10_000), contention=CONTENTIONS)
@settings(max_examples=40)
def test_reasons_fit_the_pieces(relays: float, seed: int, contention: Contention) -> None:
    plan = random_plan(seed, contention=contention, relays=relays)
    path = critical_path(plan)
    for before, segment in itertools.pairwise(path.segments):
        if segment.kind in ("forward", "loss", "backward", "forward relay", "backward relay"):
            expected = {"transfer": "input"}.get(before.kind, "node")
            assert (segment.destination, segment.reason) == (None, expected)
        elif segment.kind in ("transfer", "queueing"):
            assert segment.reason == ("link" if before.kind == "queueing" else "input")
        elif segment.kind == "overhead":
            assert (segment.reason, before.node) == ("node", segment.node)


def test_explanation_names_what_matters() -> None:
    plan = two_microbatches("link")
    text = explain(plan)
    assert text.startswith("Bottleneck: the work of nodes, ")
    assert "Critical path: 8.9500 s in 9 segments" in text
    assert "backward 4.0000 s (44.7%)" in text
    assert f"{plan.nodes[1]}: 3.0000 s; it waits for the last task of its stage" in text
    assert f"Busiest node: {plan.nodes[0]} (stage 0) computes 52.5% of the time" in text
    assert "holds 2 of 3 microbatches; 0 of 2 nodes are full" in text
    assert "Longest queue" in text


def test_summary_shows_few_of_many_places() -> None:
    plan = random_plan(3, num_microbatches=12)
    path = critical_path(plan)
    assert f"{len(path.by_place) - 5} more" in "\n".join(path_summary(plan, path))


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("reduction", "Bottleneck: gradient reduction, 5.0000 s of 9.0000 s (55.6%), of stage 1."),
        ("queueing", "Bottleneck: transfers that queue, 5.0000 s of 9.0000 s (55.6%), most on {b}{to_a}."),
        ("backward", "Bottleneck: the work of nodes, 9.0000 s of 9.0000 s (100.0%), most on {b} (stage 1)."),
    ],
)
def test_the_bottleneck_is_what_takes_most(kind: SegmentKind, sentence: str) -> None:
    plan = two_microbatches("link")
    a, b = plan.nodes
    destination = a if kind == "queueing" else None
    path = CriticalPath(
        (
            PathSegment("forward", a, None, 0, 0.0, 2.0, "start"),
            PathSegment("forward", a, None, 0, 2.0, 4.0, "node"),
            PathSegment(kind, b, destination, 0, 4.0, 9.0, "input"),
        )
    )
    assert bottleneck(plan, path) == sentence.format(b=b, to_a=f" to {a}")
