"""Gradient reduction by ring, tree, direct messages, by region: by hand, and alike in compiled search and simulator."""

import math
import random
from itertools import permutations

import pytest
from hypothesis import given, settings, strategies as st
from pydantic import ValidationError
from random_plans import share_capacities
from small_problems import make_problem, share_links
from test_kernel import begin, plan_of

from skippipe_scheduler.bounds import lower_bounds
from skippipe_scheduler.plan.simulate import simulate
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.problem.costs import Costs
from skippipe_scheduler.problem.gradient_reduction import LinkSpeeds, reduction_s
from skippipe_scheduler.problem.problem import Problem, StageNodes
from skippipe_scheduler.problem.sharing.capacities import Duplex, SharedCapacities, Uplink
from skippipe_scheduler.slots.least_reductions import least_reductions_s
from skippipe_scheduler.slots.replica_order import order_replicas
from skippipe_scheduler.slots.slot_model import SlotModel
from skippipe_scheduler.solver.solve import SolveOptions, solve


def reducing(
    seed: int, sizes: tuple[int, ...], reduction: str, *, even: bool = False, contention: str = "none"
) -> Problem:
    """Return a problem whose gradients cross links of very different latency and bandwidth."""
    problem = share_links(make_problem(seed, sizes, 2, max(4, sizes[0]), fixed=False), "link")
    generator = random.Random(seed)
    content = problem.model_dump()
    costs = content["costs"]
    costs["contention"] = "link" if contention == "shared" else contention
    for source in problem.nodes:
        for sink in costs["latency_s"][source]:
            latency_s = 0.5 if even else generator.uniform(0.1, 3.0)
            gbit_per_s = 2.0 if even else generator.uniform(0.5, 8.0)
            costs["latency_s"][source][sink], costs["gbit_per_s"][source][sink] = latency_s, gbit_per_s
            costs["transfer_s"][source][sink] = latency_s + costs["activation_bytes"] * 8e-9 / gbit_per_s
    stage_bytes = tuple(1_000_000_000 * (stage + 1) for stage in range(len(sizes)))
    if contention == "shared":
        content["costs"] = share_capacities(Costs.model_validate(costs), generator).model_dump()
    regions = tuple(generator.choice("abc") for _ in problem.nodes)
    return Problem.model_validate(content | {"stage_bytes": stage_bytes, "reduction": reduction, "regions": regions})


@settings(max_examples=40, derandomize=True)
@given(
    st.integers(0, 1000),
    st.tuples(st.integers(1, 7), st.integers(1, 5), st.integers(1, 3)),
    st.sampled_from(["ring", "tree", "direct", "hierarchical"]),
    st.sampled_from(["none", "link", "node", "shared"]),
)
def test_search_and_simulator_agree(seed: int, sizes: tuple[int, int, int], reduction: str, contention: str) -> None:
    search, solution = begin(reducing(seed, sizes, reduction, contention=contention))
    plan = plan_of(search, solution)
    validate(plan)
    assert plan.costs.reduce_s == pytest.approx(search.slot_model.problem.reduce_s(tuple(s.nodes for s in plan.stages)))
    assert solution.iteration_s == pytest.approx(simulate(plan).iteration_s, rel=1e-9)


@pytest.mark.parametrize("seed", range(15))
def test_search_and_simulator_agree_where_all_send_to_all_over_shared_uplinks(seed: int) -> None:
    problem = reducing(seed, (7, 5, 3), "direct", contention="shared")
    assert problem.costs.uplinks
    search, solution = begin(problem)
    assert solution.iteration_s == pytest.approx(simulate(plan_of(search, solution)).iteration_s, rel=1e-9)


@pytest.mark.parametrize("replicas", range(1, 10))
def test_times_of_equal_links(replicas: int) -> None:
    nodes = (tuple(f"node-{index}" for index in range(replicas)), (f"node-{replicas}",), (f"node-{replicas + 1}",))
    sizes = (replicas, 1, 1)
    # 8 Gbit at 2 Gbit/s and half a second of latency.
    reductions = ("ring", "tree", "direct")
    ring_s, tree_s, direct_s = (reducing(0, sizes, reduction, even=True).reduce_s(nodes) for reduction in reductions)
    assert ring_s == pytest.approx((2 * (replicas - 1) * (0.5 + 4.0 / replicas), 0, 0))
    assert tree_s == pytest.approx((2 * math.ceil(math.log2(replicas)) * 4.5, 0, 0))
    one_s = 0.5 + 4.0 / replicas
    assert direct_s == pytest.approx((2 * one_s if replicas > 1 else 0, 0, 0))
    shared_s = reducing(0, sizes, "direct", even=True, contention="node").reduce_s(nodes)
    assert shared_s[0] == pytest.approx(2 * (0.5 + 4.0 * (replicas - 1) / replicas) if replicas > 1 else 0)


def test_edges_of_a_tree_by_hand() -> None:
    problem = reducing(3, (5, 1, 1), "tree")
    costs = problem.costs
    order = ("node-4", "node-2", "node-0", "node-1", "node-3")

    def message_s(source: int, sink: int) -> float:
        a, b = order[source], order[sink]
        return (costs.latency_s or {})[a][b] + 8.0 / (costs.gbit_per_s or {})[a][b]

    up_s = [max(message_s(1, 0), message_s(3, 2)), message_s(2, 0), message_s(4, 0)]
    down_s = [message_s(0, 4), message_s(0, 2), max(message_s(0, 1), message_s(2, 3))]
    assert problem.reduce_s((order, ("node-5",), ("node-6",)))[0] == pytest.approx(sum(up_s) + sum(down_s))


def test_direct_messages_by_hand() -> None:
    problem = reducing(3, (3, 1, 1), "direct")
    latency_s, gbit_per_s = problem.costs.latency_s or {}, problem.costs.gbit_per_s or {}
    order = ("node-2", "node-0", "node-1")
    longest_s = max(latency_s[a][b] + 8.0 / 3 / gbit_per_s[a][b] for a, b in permutations(order, 2))
    assert problem.reduce_s((order, ("node-3",), ("node-4",)))[0] == pytest.approx(2 * longest_s)


def by_region(sizes: tuple[int, ...], regions: str, contention: str = "none") -> float:
    """Return the seconds of 8 Gbit over the replicas of the first stage: 2 Gbit/s and half a second of latency."""
    problem = reducing(0, sizes, "hierarchical", even=True, contention=contention)
    nodes = tuple(f"node-{index}" for index in range(len(problem.nodes)))
    placed = (nodes[: sizes[0]], *((node,) for node in nodes[sizes[0] :]))
    return problem.model_copy(update={"regions": tuple(regions)}).reduce_s(placed)[0]


def test_sums_by_region_by_hand() -> None:
    """Within regions each message has all bytes of a lane, between them one part of them for each region."""
    assert by_region((4, 1, 1), "aabbzz") == pytest.approx(2 * (0.5 + 2.0) + 2 * (0.5 + 1.0))  # 2 lanes, 2 regions
    assert by_region((3, 1, 1), "aabzz") == pytest.approx(2 * (0.5 + 4.0) + 2 * (0.5 + 2.0))  # 1 lane
    assert by_region((3, 1, 1), "abczz") == pytest.approx(2 * (0.5 + 4.0 / 3))  # as direct: nobody is near
    assert by_region((3, 1, 1), "aaazz") == pytest.approx(2 * (0.5 + 4.0 / 3))  # as direct: all are
    # On a shared card three messages of a lane to its region leave one after the other.
    assert by_region((4, 1, 1), "aaaazz", "node") == pytest.approx(2 * (0.5 + 3 * 1.0))


def test_sums_by_region_need_regions() -> None:
    content = reducing(0, (3, 1, 1), "hierarchical").model_dump() | {"regions": None}
    with pytest.raises(ValidationError, match="give regions"):
        Problem.model_validate(content)


def test_a_shared_way_out_favours_sums_by_region() -> None:
    """Two regions of four: half of all messages cross, and the whole region pays for each."""
    nodes = tuple(f"node-{index}" for index in range(8))
    links = LinkSpeeds(
        {node: dict.fromkeys(nodes, 0.04) for node in nodes},
        {node: {other: 1.0 if node[-1] < "4" and other[-1] > "3" else 10.0 for other in nodes} for node in nodes},
        capacities=SharedCapacities.of({}, [Uplink(name="a", nodes=nodes[:4], gbit_per_s=Duplex(up=1.0, down=1.0))]),
        region_of={node: "a" if node[-1] < "4" else "b" for node in nodes},
    )
    assert reduction_s("hierarchical", links, nodes, 8.0) < 0.5 * reduction_s("direct", links, nodes, 8.0)


def test_given_reduction_times_win() -> None:
    problem = reducing(0, (3, 1, 1), "tree")
    costs = problem.costs.model_copy(update={"reduce_s": (1.0, 2.0, 3.0)})
    assert problem.model_copy(update={"costs": costs}).reduce_s(()) == (1.0, 2.0, 3.0)


def test_latency_favours_the_tree_and_bytes_the_ring() -> None:
    """Eight replicas: 14 small messages of a ring against 6 whole ones of a tree."""
    nodes = (tuple(f"node-{index}" for index in range(8)), ("node-8",), ("node-9",))

    def seconds(reduction: str, stage_bytes: int) -> float:
        problem = reducing(0, (8, 1, 1), reduction, even=True)
        return problem.model_copy(update={"stage_bytes": (stage_bytes,) * 3}).reduce_s(nodes)[0]

    assert seconds("tree", 1000) < 0.5 * seconds("ring", 1000)
    assert seconds("ring", 10**10) < 0.5 * seconds("tree", 10**10)


@pytest.mark.parametrize("reduction", ["ring", "tree"])
def test_the_search_orders_the_replicas(reduction: str) -> None:
    problem = reducing(7, (4, 1, 1), reduction)
    plan = solve(problem, SolveOptions(max_evaluations=3000))
    first, *others = (stage.nodes for stage in plan.stages)
    orders_s = [problem.reduce_s((order, *others))[0] for order in permutations(first)]
    assert problem.reduce_s((first, *others))[0] == pytest.approx(min(orders_s))
    assert max(orders_s) > 1.1 * min(orders_s)


@settings(max_examples=60, derandomize=True)
@given(st.integers(0, 1000), st.integers(1, 9), st.sampled_from(["ring", "tree"]), st.sampled_from(["link", "shared"]))
def test_no_order_of_the_replicas_reduces_in_less_than_the_least(
    seed: int, replicas: int, reduction: str, contention: str
) -> None:
    problem = reducing(seed, (replicas, 1, 1), reduction, contention=contention)
    nodes, others = list(problem.nodes[:replicas]), ((problem.nodes[replicas],), (problem.nodes[replicas + 1],))
    least_s = least_reductions_s(problem, (tuple(nodes), *others))
    model = SlotModel(problem)
    orders = [
        *random_orders(nodes, seed),
        [problem.nodes[rank] for rank in order_replicas(model, tuple(range(replicas + 2)))],
    ]
    found_s = [problem.reduce_s((tuple(order[:replicas]), *others))[0] for order in orders]
    assert least_s[0] <= min(found_s) * (1 + 1e-12)
    assert least_s[1:] == (0, 0)
    if replicas <= 5:  # then all orders are tried
        assert least_s[0] == pytest.approx(found_s[-1])


def random_orders(nodes: list[str], seed: int) -> list[list[str]]:
    generator = random.Random(seed)
    return [generator.sample(nodes, len(nodes)) for _ in range(60)]


@pytest.mark.parametrize("reduction", ["ring", "tree", "direct", "hierarchical"])
@settings(max_examples=8, derandomize=True)
@given(seed=st.integers(0, 1000), sizes=st.sampled_from([(1, 4, 1), (2, 3, 2), (1, 7, 1)]))
def test_bounds_of_a_given_placement_hold_for_every_order_of_replicas(
    reduction: str, seed: int, sizes: tuple[int, ...]
) -> None:
    problem = reducing(seed, sizes, reduction)
    ends = [sum(sizes[: stage + 1]) for stage in range(len(sizes))]
    stages = tuple(StageNodes(nodes=problem.nodes[end - size : end]) for size, end in zip(sizes, ends, strict=True))
    given_stages = problem.model_copy(update={"stages": stages, "stage_sizes": None})
    plan = solve(given_stages, SolveOptions(max_evaluations=300))
    bounds = lower_bounds(given_stages)
    assert max(bounds.values()) <= plan.predicted.iteration_s * (1 + 1e-9)
    if reduction in ("ring", "tree"):
        turned = tuple(StageNodes(nodes=stage.nodes[::-1]) for stage in stages)
        other = given_stages.model_copy(update={"stages": turned})
        assert lower_bounds(other, 0.0) == pytest.approx(lower_bounds(given_stages, 0.0))
