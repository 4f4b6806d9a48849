"""Contention "shared": cards and uplinks that messages share fairly, against times worked out by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from pydantic import ValidationError
from random_plans import random_plan

from skippipe.cluster.description import write_cluster
from skippipe_scheduler.bounds import explain_bound, lower_bounds
from skippipe_scheduler.errors import ProblemError
from skippipe_scheduler.plan.plan import Task
from skippipe_scheduler.plan.simulate import simulate, simulate_order
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.problem.cluster import load_cluster
from skippipe_scheduler.problem.costs import Costs
from skippipe_scheduler.problem.gradient_reduction import LinkSpeeds, Reduction, reduction_s
from skippipe_scheduler.problem.problem import Problem, StageNodes
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.problem.sharing.capacities import Duplex, Uplink
from skippipe_scheduler.problem.sharing.contention import Resource
from skippipe_scheduler.problem.sharing.fluid import Flow, FluidNetwork

NODES = ("a", "b", "c", "d")
LATENCIES_S = {"a": {"b": 1.0, "c": 2.0}, "b": {"a": 1.0, "c": 3.0}, "c": {"a": 1.0, "b": 1.0}}
TEN_SECONDS_AT_1 = 1_250_000_000
"""Bytes that take 10 s at 1 Gbit/s."""


def costs(cards: dict[str, float], uplinks: tuple[Uplink, ...] = (), **links: float) -> Costs:
    """Links of 1 Gbit/s but those named ("ab=0.2"), a latency of 1 s; tasks take 1 s, the loss none."""
    gbit_per_s = {a: {b: links.get(a + b, 1.0) for b in NODES if b != a} for a in NODES}
    return Costs(
        forward_s=dict.fromkeys(NODES, 1.0),
        backward_s=dict.fromkeys(NODES, 1.0),
        loss_s=dict.fromkeys(NODES, 0.0),
        transfer_s={a: {b: 1.0 + 10.0 / speed for b, speed in row.items()} for a, row in gbit_per_s.items()},
        memory=dict.fromkeys(NODES, 9),
        contention="shared",
        activation_bytes=TEN_SECONDS_AT_1,
        latency_s={a: dict.fromkeys(row, 1.0) for a, row in gbit_per_s.items()},
        gbit_per_s=gbit_per_s,
        card_gbit_per_s={node: Duplex(up=speed, down=speed) for node, speed in cards.items()},
        uplinks=uplinks,
    )


def first_arrivals_s(given: Costs, *links: str) -> list[float]:
    """When the first message of each of `links` ("ab") arrives; a node that sends twice does so 1 s later."""
    routes = [(link[0], link[1]) for link in links]
    order: dict[str, list[Task]] = {node: [] for node in NODES}
    for operation in ("F", "L", "B"):
        for microbatch, route in enumerate(routes):
            for node in route if operation == "F" else route[:1] if operation == "L" else reversed(route):
                order[node].append(Task(operation, microbatch))
    spans = simulate_order(routes, order, given).transfers
    arrival_s = {span.microbatch: span.end_s for span in spans if (span.direction, span.hop) == ("forward", 0)}
    return [arrival_s[microbatch] for microbatch in range(len(links))]


def test_two_messages_over_one_card_have_half_each() -> None:
    """Ready at 1 and 2: alone for 1 s, then half each. The first ends at 2 + 9 * 2, the second has 1 Gbit left then."""
    assert first_arrivals_s(costs({}), "ab", "ac") == pytest.approx([1 + 10 + 1, 2 + 10 + 1])
    assert first_arrivals_s(costs({"a": 1.0}), "ab", "ac") == pytest.approx([20 + 1, 21 + 1])
    assert first_arrivals_s(costs({"c": 1.0}), "ac", "bc") == pytest.approx([21 + 1, 21 + 1])


def test_a_slow_link_leaves_a_fast_one_the_rest_of_the_card() -> None:
    """The slow link takes 0.2 Gbit/s of the card: 10 Gbit of the fast one leave at 0.8 from second 2 on."""
    assert first_arrivals_s(costs({"a": 1.0}, ab=0.2), "ab", "ac") == pytest.approx([1 + 50 + 1, 2 + 12.5 + 1])


def test_three_messages_share_the_uplink_of_their_site_both_ways() -> None:
    site = Uplink(name="site", nodes=("a", "b", "c"), gbit_per_s=Duplex(up=1.0, down=2.0))
    given = costs({}, (site,))
    assert first_arrivals_s(given, "ad", "bd", "cd") == pytest.approx([1 + 30 + 1] * 3)
    assert first_arrivals_s(given, "ad", "bc") == pytest.approx([1 + 10 + 1] * 2)
    # Into the site: ready at 1, 2 and 3; two at a time go at full speed, three at 2/3.
    into = first_arrivals_s(given, "da", "db", "dc")
    assert into == pytest.approx([3 + 8 / (2 / 3) + 1, 15 + 1 + 1, 16 + 1 + 1])


def test_a_message_that_ends_early_gives_its_share_to_the_others() -> None:
    network = FluidNetwork({("out", "a"): 3.0})
    flows = [Flow(gbit, 9.0, (("out", "a"),)) for gbit in (1.0, 2.0, 3.0)]
    for flow in flows:
        network.start(flow, 0.0)
    ends_s = []
    for flow in flows:
        assert network.next_to_end is flow
        ends_s.append(network.next_end_s)
        network.stop(flow, network.next_end_s)
    assert ends_s == pytest.approx([1.0, 1.0 + 1 / 1.5, 1.0 + 1 / 1.5 + 1 / 3])
    assert network.next_end_s == math.inf


@st.composite
def networks(draw: st.DrawFn) -> tuple[dict[Resource, float], list[tuple[float, Flow]]]:
    """Capacities, and flows with the time at which they set out."""
    resources = [("out", str(index)) for index in range(draw(st.integers(1, 4)))]
    capacity = {resource: draw(st.floats(0.1, 10)) for resource in resources}
    flows = [
        (
            draw(st.floats(0, 3)),
            Flow(
                draw(st.floats(0.01, 10)),
                draw(st.floats(0.1, 10)),
                tuple(draw(st.lists(st.sampled_from(resources), unique=True, max_size=3))),
            ),
        )
        for _ in range(draw(st.integers(1, 8)))
    ]
    return capacity, sorted(flows, key=lambda entry: entry[0])


@settings(max_examples=60)
@given(networks())
def test_shares_are_max_min_fair_at_every_instant_and_all_bytes_arrive(
    network: tuple[dict[Resource, float], list[tuple[float, Flow]]],
) -> None:
    capacity, waiting = network
    fluid, under_way, sent = FluidNetwork(capacity), list[Flow](), dict[Flow, float]()
    sizes = {flow: flow.left_gbit for _, flow in waiting}
    now_s = 0.0
    while waiting or under_way:
        next_s = min(fluid.next_end_s, waiting[0][0] if waiting else math.inf)
        for flow in under_way:
            sent[flow] = sent.get(flow, 0.0) + flow.gbit_per_s * (next_s - now_s)
        now_s = next_s
        if waiting and waiting[0][0] == next_s:
            under_way.append(waiting.pop(0)[1])
            fluid.start(under_way[-1], now_s)
        else:
            under_way.remove(ended := fluid.next_to_end)
            fluid.stop(ended, now_s)
            assert sent[ended] == pytest.approx(sizes[ended])
        used = {resource: [flow for flow in under_way if resource in flow.used] for resource in capacity}
        load = {resource: sum(flow.gbit_per_s for flow in flows) for resource, flows in used.items()}
        assert all(load[resource] <= capacity[resource] * (1 + 1e-9) for resource in capacity)
        for flow in under_way:
            # Bertsekas and Gallager: fair is who has a bottleneck, a full resource where nobody has more.
            bottlenecks = [
                resource
                for resource in flow.used
                if load[resource] >= capacity[resource] * (1 - 1e-9)
                and all(other.gbit_per_s <= flow.gbit_per_s * (1 + 1e-9) for other in used[resource])
            ]
            assert bottlenecks or flow.gbit_per_s == flow.most_gbit_per_s


@pytest.mark.parametrize("relays", [0.0, 0.5])
@settings(max_examples=30)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_without_capacities_it_is_contention_on_links(relays: float, seed: int, lost_share: float) -> None:
    plan = random_plan(seed, contention="link", num_microbatches=9, relays=relays)
    shared = plan.model_copy(update={"costs": plan.costs.model_copy(update={"contention": "shared"})})
    for options in ({}, {"jitter_sigma": 0.3}, {"lost_s": {plan.nodes[1]: lost_share * plan.predicted.iteration_s}}):
        queued, fluid = (simulate(each, **options) for each in (plan, shared))
        if "jitter_sigma" not in options:
            assert fluid.iteration_s == pytest.approx(queued.iteration_s)
            assert len(fluid.transfers) == len(queued.transfers)
        assert len(fluid.tasks) == len(queued.tasks)


@pytest.mark.parametrize("relays", [0.0, 0.5])
@settings(max_examples=40)
@given(st.integers(0, 10_000))
def test_sharing_only_delays_and_no_link_carries_two(relays: float, seed: int) -> None:
    plan = random_plan(seed, contention="shared", num_nodes=7, num_microbatches=10, relays=relays)
    validate(plan)
    timeline = simulate(plan)
    alone = plan.costs.model_copy(update={"contention": "none", "card_gbit_per_s": None, "uplinks": None})
    assert timeline.pipeline_s >= simulate(plan.model_copy(update={"costs": alone})).pipeline_s - 1e-9
    free_s: dict[tuple[str, str], float] = {}
    for span in sorted(timeline.transfers, key=lambda span: span.start_s):
        link = span.source, span.destination
        assert span.start_s >= max(span.ready_s, free_s.get(link, 0.0)) - 1e-9
        assert span.free_s - span.start_s >= plan.costs.occupancy_s(*link) * (1 - 1e-9)
        free_s[link] = span.free_s


def test_a_lost_node_leaves_its_share_to_the_others() -> None:
    """Both messages of b's card have half; from second 5 on, when c is lost, the other one has all."""
    given = costs({"b": 1.0})
    order = {"a": [Task("F", 0)], "c": [Task("F", 1)], "b": [Task("F", 0), Task("F", 1)]}
    timeline = simulate_order([("a", "b"), ("c", "b")], order, given, lost_s={"c": 5.0})
    assert [span.end_s for span in timeline.transfers if span.hop == 0] == pytest.approx([1 + 4 + 8 + 1])


def test_messages_of_a_reduction_share_like_others() -> None:
    """10 Gbit over a, b and c: a ring has one message each way on every card, direct two, and c is a site."""
    site = Uplink(name="site", nodes=("c",), gbit_per_s=Duplex(up=1.0, down=0.5))
    given = costs(dict.fromkeys(NODES, 1.0), (site,), ab=0.25, ac=0.5, bc=0.5, dc=0.5).model_copy(
        update={"latency_s": LATENCIES_S}
    )

    def reduced_s(kind: Reduction, shared: Costs) -> float:
        links = LinkSpeeds(shared.latency_s or {}, shared.gbit_per_s or {}, capacities=shared.shared_capacities())
        return reduction_s(kind, links, ("a", "b", "c"), 3.0)

    # Of 1 Gbit each: a to b takes 4 s and its latency of 1 s, b to c goes through half a Gbit/s.
    assert reduced_s("ring", given) == pytest.approx(4 * (4 + 1))
    # Into c come two at once, which take 4 s, from b with a latency of 3 s.
    assert reduced_s("direct", given) == pytest.approx(2 * (4 + 3))
    # 3 Gbit: b to a takes 3 s, then c to a; back c gets them at half a Gbit/s, and a to b is slow.
    assert reduced_s("tree", given) == pytest.approx((3 + 1) + (3 + 1) + (6 + 2) + (12 + 1))


def test_bounds_know_what_cards_and_uplinks_have_to_carry() -> None:
    """Six microbatches from a in the site to d outside: 2 messages of 10 Gbit each way for each, up at 1 Gbit/s."""
    site = Uplink(name="site", nodes=("a", "b"), gbit_per_s=Duplex(up=1.0, down=1.0))
    problem = Problem(
        nodes=("a", "d"),
        stages=(StageNodes(nodes=("a",)), StageNodes(nodes=("d",))),
        microbatches_per_origin=6,
        costs=only(costs({}, (site,)), "a", "d"),
        rules=Rules(num_stages=2, route_length=2),
    )
    assert lower_bounds(problem, 0)["carrying"] == pytest.approx(6 * 2 * 10)
    assert "the uplink of site takes this long" in explain_bound(problem, {"carrying": 120.0})
    slow = dict.fromkeys(("ad", "bd", "cd", "da", "db", "dc"), 0.5)
    cards = problem.model_copy(update={"costs": only(costs({"a": 1.0, "d": 0.5}, (), **slow), "a", "d")})
    assert lower_bounds(cards, 0)["carrying"] == pytest.approx(6 * 2 * 20)


def only(given: Costs, *nodes: str) -> Costs:
    """Return the costs of these nodes alone."""
    content = given.model_dump()
    for name, table in content.items():
        if isinstance(table, dict):
            content[name] = {node: value for node, value in table.items() if node in nodes}
    for name in ("transfer_s", "latency_s", "gbit_per_s"):
        content[name] = {a: {b: value for b, value in row.items() if b in nodes} for a, row in content[name].items()}
    for uplink in content["uplinks"]:
        uplink["nodes"] = tuple(node for node in uplink["nodes"] if node in nodes)
    return Costs.model_validate(content)


def test_cluster_files_give_capacities(tmp_path: Path) -> None:
    text = """
name: two-sites
nodes:
  - {name: lab, count: 2, region: Berlin, compute_tflop_per_s: 1, memory_gib: 1, card_gbit_per_s: {up: 1, down: 5}}
  - {name: cloud, region: Iowa, compute_tflop_per_s: 1, memory_gib: 1}
links:
  contention: shared
  card_gbit_per_s: 10
  uplink_gbit_per_s: {Berlin: {up: 0.5, down: 2}, Iowa: 40}
  default: {latency_ms: 10, gbit_per_s: 25}
"""
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    cluster = load_cluster(path)
    assert cluster.cards() == {
        **dict.fromkeys(("lab-0", "lab-1"), Duplex(up=1, down=5)),
        "cloud": Duplex(up=10, down=10),
    }
    assert [uplink.nodes for uplink in cluster.uplinks()] == [("lab-0", "lab-1"), ("cloud",)]
    speeds = {(source, sink): link.gbit_per_s for source, sink, link in cluster.resolved_links()}
    assert (speeds["lab-0", "lab-1"], speeds["lab-0", "cloud"], speeds["cloud", "lab-0"]) == (1, 0.5, 2)
    write_cluster(tmp_path / "again.yaml", cluster, [])
    assert load_cluster(tmp_path / "again.yaml") == cluster
    for old, new, message in (
        ("contention: shared", "contention: node", "links.card_gbit_per_s counts with links.contention shared only"),
        ("Iowa: 40", "Iowas: 40", "unknown region 'Iowas'; did you mean 'Iowa'"),
        ("card_gbit_per_s: 10", "card_gbit_per_s: 0", "greater than 0"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(ProblemError, match=message):
            load_cluster(path)


def test_capacities_are_checked() -> None:
    content = costs({"a": 1.0}).model_dump()
    wrong: dict[str, dict[str, Any]] = {
        'card_gbit_per_s counts with contention "shared" only': {"contention": "link"},
        "gbit_per_s from 'a' to 'b' is 1, but a card or uplink on the way carries 0.5": {"card_gbit_per_s": {"a": 0.5}},
        "uplinks: the name 'x' is used twice": {
            "uplinks": [{"name": "x", "nodes": [node], "gbit_per_s": 1} for node in ("a", "b")]
        },
    }
    for message, change in wrong.items():
        with pytest.raises(ValidationError, match=message):
            Costs.model_validate_json(json.dumps(content | change))
    unknown = costs({"a": 1.0}).model_copy(update={"card_gbit_per_s": {"e": Duplex(up=1, down=1)}})
    assert "unknown node 'e'" in (unknown.missing(NODES) or "")
