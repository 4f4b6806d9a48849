"""The validator: valid plans pass, every single offence is found and named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from random_plans import random_plan, with_exact_times

from skippipe_scheduler.errors import DeadlockError, PlanError
from skippipe_scheduler.plan.validate import load_plan, validate

Content = dict[str, Any]


@pytest.mark.parametrize("relays", [0.0, 0.5])
@given(
    seed=st.integers(0, 10_000),
    num_nodes=st.integers(4, 8),
    num_microbatches=st.integers(1, 9),
    memory=st.integers(1, 4),
    contention=st.sampled_from(["none", "link", "node", "shared"]),
)
@settings(max_examples=40)
def test_random_plans_are_valid(
    relays: float, seed: int, num_nodes: int, num_microbatches: int, memory: int, contention: Any
) -> None:
    shape = {"num_nodes": num_nodes, "num_microbatches": num_microbatches, "memory": memory}
    validate(random_plan(seed, contention=contention, relays=relays, **shape))  # type: ignore[arg-type]


@pytest.mark.parametrize("relays", [0.0, 0.5])
def test_plan_file_round_trips(tmp_path: Path, relays: float) -> None:
    plan = random_plan(3, relays=relays)
    plan.save(tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.hash == plan.hash
    assert random_plan(4).hash != plan.hash


def busiest(content: Content) -> str:
    return str(max(content["order"], key=lambda node: len(content["order"][node])))


def break_nodes_twice(content: Content) -> None:
    content["nodes"][1] = content["nodes"][0]


def break_stage_count(content: Content) -> None:
    content["rules"]["num_stages"] = 5


def break_unknown_in_stage(content: Content) -> None:
    content["stages"][0]["nodes"].append("ghost")


def break_two_stages(content: Content) -> None:
    content["stages"][1]["nodes"].append(content["stages"][0]["nodes"][0])


def break_idle_node(content: Content) -> None:
    content["nodes"].append("spare")


def break_layer_gap(content: Content) -> None:
    content["stages"][2]["layers"] = [3, 4]


def break_layer_overlap(content: Content) -> None:
    content["stages"][2]["layers"] = [1, 3]


def break_empty_stage(content: Content) -> None:
    content["stages"][3]["layers"] = [3, 3]


def break_missing_cost(content: Content) -> None:
    del content["costs"]["forward_s"][content["nodes"][2]]


def break_missing_link(content: Content) -> None:
    del content["costs"]["transfer_s"][content["nodes"][0]][content["nodes"][1]]


def break_reduce(content: Content) -> None:
    content["costs"]["reduce_s"].pop()


def break_transfer(content: Content) -> None:
    content["costs"]["transfer_s"][content["nodes"][0]][content["nodes"][1]] *= 1.01


def break_ids(content: Content) -> None:
    content["microbatches"][2]["id"] = 7


def break_unknown_on_route(content: Content) -> None:
    content["microbatches"][0]["route"][1] = "ghost"


def break_route_length(content: Content) -> None:
    content["microbatches"][0]["route"].pop()


def break_origin(content: Content) -> None:
    content["microbatches"][0]["route"].reverse()


def break_order_unknown(content: Content) -> None:
    content["order"]["ghost"] = []


def break_order_twice(content: Content) -> None:
    content["order"][busiest(content)].append(content["order"][busiest(content)][0])


def break_order_extra(content: Content) -> None:
    content["order"][busiest(content)].append(["F", 99])


def break_order_missing(content: Content) -> None:
    content["order"][busiest(content)].pop()


def break_order_backward_first(content: Content) -> None:
    content["order"][busiest(content)].reverse()


def break_memory(content: Content) -> None:
    content["costs"]["memory"] = dict.fromkeys(content["nodes"], 1)


def break_iteration(content: Content) -> None:
    content["predicted"]["iteration_s"] *= 0.99


def break_iteration_slightly(content: Content) -> None:
    content["predicted"]["iteration_s"] *= 1 + 1e-5


def break_pipeline(content: Content) -> None:
    content["predicted"]["pipeline_s"] *= 0.99


def break_exposed_reduction(content: Content) -> None:
    content["predicted"]["reduce_exposed_s"] += 0.5


def break_regions(content: Content) -> None:
    content["regions"] = ["Iowa"]


def break_no_microbatches(content: Content) -> None:
    content["microbatches"] = []


def exchange(content: Content, first: str, second: str) -> None:
    """Exchange two tasks of microbatch 0 at its origin."""
    order = content["order"][content["microbatches"][0]["route"][0]]
    place, other = order.index([first, 0]), order.index([second, 0])
    order[place], order[other] = order[other], order[place]


def break_loss_after_backward(content: Content) -> None:
    exchange(content, "L", "B")


def break_loss_before_forward(content: Content) -> None:
    exchange(content, "F", "L")


def break_bound(content: Content) -> None:
    content["predicted"]["lower_bound_s"] = content["predicted"]["iteration_s"] * 1.1


OFFENCES: list[tuple[Callable[[Content], None], str]] = [
    (break_nodes_twice, "is named twice"),
    (break_stage_count, "rules.num_stages is 5"),
    (break_unknown_in_stage, "unknown node 'ghost'"),
    (break_two_stages, "holds more than one stage"),
    (break_idle_node, "node 'spare' holds no stage"),
    (break_layer_gap, "layer 2 is held by nobody"),
    (break_layer_overlap, "layer 1 is held twice"),
    (break_empty_stage, "holds no layer"),
    (break_missing_cost, "costs.forward_s has no entry"),
    (break_missing_link, "costs.transfer_s has no entry"),
    (break_reduce, "3 entries for 4 stages"),
    (break_transfer, "but latency \\+ bytes / bandwidth"),
    (break_ids, "id is 7"),
    (break_unknown_on_route, "unknown node 'ghost'"),
    (break_route_length, "visits 2 stages"),
    (break_origin, "the route starts at stage|the route jumps|the route visits"),
    (break_order_unknown, "order: unknown node 'ghost'"),
    (break_order_twice, "is listed twice"),
    (break_order_extra, "forward of microbatch 99 does not belong"),
    (break_order_missing, "is missing"),
    (break_order_backward_first, "stands before its"),
    (break_memory, "costs.memory allows 1"),
    (break_iteration, "predicted.iteration_s"),
    (break_iteration_slightly, "predicted.iteration_s"),
    (break_pipeline, "predicted.pipeline_s"),
    (break_exposed_reduction, "predicted.reduce_exposed_s"),
    (break_regions, "regions: 1 entries for 5 nodes"),
    (break_no_microbatches, "microbatches: there are none"),
    (break_loss_after_backward, "backward of microbatch 0 stands before its loss"),
    (break_loss_before_forward, "loss of microbatch 0 stands before its forward"),
    (break_bound, "above the iteration"),
]


@pytest.mark.parametrize(("damage", "expected"), OFFENCES, ids=[damage.__name__ for damage, _ in OFFENCES])
def test_every_offence_is_named(tmp_path: Path, damage: Callable[[Content], None], expected: str) -> None:
    content = json.loads(random_plan(5, contention="link", memory=3, num_microbatches=9).to_json())
    damage(content)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=expected) as caught:
        load_plan(path)
    assert str(caught.value).startswith(str(path))
    assert caught.value.exit_code == 2


def relayed_content() -> Content:
    """Return a plan in which two nodes relay messages of microbatch 0, neither of them as the last on the path."""
    drawn = random_plan(5, contention="link", memory=3, num_microbatches=9, relays=0.5)
    content: Content = json.loads(drawn.to_json())
    return content


def relay_of(content: Content) -> str:
    """Return the first relay of microbatch 0."""
    microbatch = content["microbatches"][0]
    return str(next(node for node in microbatch["path"] if node not in microbatch["route"]))


def break_unknown_on_path(content: Content) -> None:
    content["microbatches"][0]["path"].append("ghost")


def break_twice_on_path(content: Content) -> None:
    content["microbatches"][0]["path"].append(relay_of(content))


def break_route_node_twice_on_path(content: Content) -> None:
    content["microbatches"][0]["path"].append(content["microbatches"][0]["route"][1])


def break_path_origin(content: Content) -> None:
    path = content["microbatches"][0]["path"]
    path.remove(relay_of(content))
    path.insert(0, next(node for node in content["nodes"] if node not in path))


def break_path_order(content: Content) -> None:
    microbatch = content["microbatches"][0]
    path, (_, second, third, *_) = microbatch["path"], microbatch["route"]
    microbatch["path"] = [{second: third, third: second}.get(node, node) for node in path]


def break_path_without_a_node_of_the_route(content: Content) -> None:
    content["microbatches"][0]["path"].remove(content["microbatches"][0]["route"][-1])


def break_path_of_one(content: Content) -> None:
    content["microbatches"][0]["path"] = content["microbatches"][0]["route"][:1]


def break_path_empty(content: Content) -> None:
    content["microbatches"][0]["path"] = []


def break_relay_without_tasks(content: Content) -> None:
    order = content["order"][relay_of(content)]
    order[:] = [task for task in order if task not in (["RF", 0], ["RB", 0])]


def break_relay_one_way(content: Content) -> None:
    content["order"][relay_of(content)].remove(["RB", 0])


def break_relay_forward_missing(content: Content) -> None:
    content["order"][relay_of(content)].remove(["RF", 0])


def break_relay_not_on_path(content: Content) -> None:
    content["microbatches"][0]["path"].remove(relay_of(content))


def break_relay_on_route(content: Content) -> None:
    content["order"][content["microbatches"][0]["route"][1]] += [["RF", 0], ["RB", 0]]


def break_relay_twice(content: Content) -> None:
    content["order"][relay_of(content)].append(["RF", 0])


def break_relay_that_computes(content: Content) -> None:
    order = content["order"][relay_of(content)]
    order[order.index(["RF", 0])] = ["F", 0]


def break_relay_backward_first(content: Content) -> None:
    order = content["order"][relay_of(content)]
    forward, backward = order.index(["RF", 0]), order.index(["RB", 0])
    order[forward], order[backward] = order[backward], order[forward]


RELAY_OFFENCES: list[tuple[Callable[[Content], None], str]] = [
    (break_unknown_on_path, "microbatches.0: the path has the unknown node 'ghost'"),
    (break_twice_on_path, "microbatches.0: the path comes to 'node-\\d' twice"),
    (break_route_node_twice_on_path, "microbatches.0: the path comes to 'node-\\d' twice"),
    (break_path_origin, "microbatches.0: the path begins at 'node-\\d', the route at 'node-\\d'"),
    (break_path_order, "microbatches.0: the path comes to node-\\d, .*; the route is node-"),
    (break_path_without_a_node_of_the_route, "microbatches.0: the path comes to node-\\d, .*; the route is node-"),
    (break_path_of_one, "microbatches.0.path: .* at least 2 items"),
    (break_path_empty, "microbatches.0.path: .* at least 2 items"),
    (break_relay_without_tasks, "the backward relay of microbatch 0 is missing"),
    (break_relay_one_way, "the backward relay of microbatch 0 is missing"),
    (break_relay_forward_missing, "the forward relay of microbatch 0 is missing"),
    (break_relay_not_on_path, "the backward relay of microbatch 0 does not belong there"),
    (break_relay_on_route, "the backward relay of microbatch 0 does not belong there"),
    (break_relay_twice, "the forward relay of microbatch 0 is listed twice"),
    (break_relay_that_computes, "the forward of microbatch 0 does not belong there"),
    (break_relay_backward_first, "the backward relay of microbatch 0 stands before its forward relay"),
]


@pytest.mark.parametrize(("damage", "expected"), RELAY_OFFENCES, ids=[damage.__name__ for damage, _ in RELAY_OFFENCES])
def test_every_offence_of_a_relay_is_named(tmp_path: Path, damage: Callable[[Content], None], expected: str) -> None:
    content, path = relayed_content(), tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    load_plan(path)
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=expected):
        load_plan(path)


def test_a_path_that_is_the_route_relays_nothing() -> None:
    plan = random_plan(3)
    microbatches = tuple(each.model_copy(update={"path": each.route}) for each in plan.microbatches)
    same = plan.model_copy(update={"microbatches": microbatches})
    validate(same)
    assert not any(each.relays for each in same.microbatches)


def test_uneven_coverage_is_named() -> None:
    plan = random_plan(6, num_nodes=4, num_microbatches=1)
    twice = plan.model_copy(
        update={"microbatches": tuple(plan.microbatches[0].model_copy(update={"id": index}) for index in range(3))}
    )
    with pytest.raises(PlanError, match="uniform_coverage"):
        validate(twice)


def test_a_changed_copy_of_a_proved_plan_is_proved_anew() -> None:
    plan = random_plan(3, num_nodes=4, num_stages=4, route_length=4, num_microbatches=2, swaps=0)
    validate(plan)
    assert plan.stage_of  # cached, and copied by model_copy
    first, second = plan.stages[1], plan.stages[3]
    exchanged = (
        plan.stages[0],
        first.model_copy(update={"nodes": second.nodes}),
        plan.stages[2],
        second.model_copy(update={"nodes": first.nodes}),
    )
    with pytest.raises(PlanError, match="max_swap_distance"):
        validate(with_exact_times(plan.model_copy(update={"stages": exchanged})))


def test_deadlock_in_a_file_is_named(tmp_path: Path) -> None:
    content = json.loads(random_plan(8, num_nodes=4, num_microbatches=2, swaps=0, memory=2).to_json())
    origin = content["stages"][0]["nodes"][0]
    content["order"][origin] = [["F", 0], ["L", 0], ["B", 0], ["F", 1], ["L", 1], ["B", 1]]
    other = next(n for n in content["microbatches"][0]["route"][1:] if n in content["microbatches"][1]["route"])
    content["order"][other] = [["F", 1], ["F", 0], ["B", 0], ["B", 1]]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(DeadlockError, match="waits for the input"):
        load_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "not valid JSON"),
        ('{"format": "skippipe.plan/1"', "may be truncated"),
        ("[]", "expected a JSON object"),
        ('{"format": "skippipe.plan/9"}', "expected 'skippipe.plan/1'"),
        ('{"format": "skippipe.plan/1", "stages": 3}', "nodes: Field required"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match=expected):
        load_plan(tmp_path / "plan.json")


def test_truncated_plan_is_refused_at_every_length(tmp_path: Path) -> None:
    text = random_plan(9).to_json()
    for length in range(0, len(text) - 2, len(text) // 25):
        (tmp_path / "plan.json").write_text(text[:length])
        with pytest.raises(PlanError):
            load_plan(tmp_path / "plan.json")


def test_a_changed_copy_has_its_own_hash_and_stages() -> None:
    plan = random_plan(3)
    before = (plan.hash, plan.stage_of)
    copied = plan.model_copy(update={"stages": plan.stages[::-1]})
    assert (copied.hash, copied.stage_of) != before
    assert plan.model_copy().hash == plan.hash
