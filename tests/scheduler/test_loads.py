"""The loads that a start is balanced by: what cards carry and what reductions take, as the exact times have it."""

from collections import Counter, defaultdict
from itertools import pairwise

import pytest
from small_problems import make_problem, share_links
from test_kernel import begin
from test_reduction import reducing

from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.problem.sharing.contention import Contention
from skippipe_scheduler.search.kernel.loads import KEPT, Balancing, anneal_loads, empty_loads
from skippipe_scheduler.search.local_search import LocalSearch
from skippipe_scheduler.slots.replica_order import order_replicas
from skippipe_scheduler.slots.routes import balanced_routes
from skippipe_scheduler.slots.slot_model import SlotModel

OUT, IN, SHARE, SUMS, CARRIED, CARRIED_SHARE = 2, 3, 4, 5, 6, 7
REDUCTIONS = 2
COUNTED = Balancing(0, 0.1, 0.1, 0.0, 1.0, 0.2)
"""No step: the loads are only counted."""


def test_a_card_carries_all_that_its_routes_send_and_receive() -> None:
    problem = share_links(make_problem(2, [2, 3, 2], 3, 8, fixed=False), "node")
    search, solution = begin(problem)
    loads = empty_loads(search.instance, 0)
    anneal_loads(search.instance, search.current, search.work, search.queue.sharing, loads, COUNTED)
    sent_s: defaultdict[int, float] = defaultdict(float)
    received_s: defaultdict[int, float] = defaultdict(float)
    for route in solution.routes:
        there = list(zip(route, (*route[1:], route[0]), strict=True))
        for source, sink in [*there, *((sink, source) for source, sink in there)]:
            names = [problem.nodes[solution.placement[slot]] for slot in (source, sink)]
            occupied_s = problem.costs.occupancy_s(*names)
            sent_s[source] += occupied_s
            received_s[sink] += occupied_s
    assert loads.rows[OUT, :7].tolist() == pytest.approx([sent_s[slot] for slot in range(7)])
    assert loads.rows[IN, :7].tolist() == pytest.approx([received_s[slot] for slot in range(7)])


def test_cards_and_uplinks_carry_all_that_goes_through_them() -> None:
    problem = share_links(make_problem(2, [2, 3, 2], 3, 8, fixed=False), "shared")
    search, solution = begin(problem)
    resources = search.queue.sharing.resources.shape[1]
    loads = empty_loads(search.instance, resources)
    anneal_loads(search.instance, search.current, search.work, search.queue.sharing, loads, COUNTED)
    capacities = problem.costs.shared_capacities()
    carried_s = dict.fromkeys(capacities.gbit_per_s, 0.0)
    for route in solution.routes:
        nodes = [problem.nodes[solution.placement[slot]] for slot in (*route, route[0])]
        for ends in [*pairwise(nodes), *pairwise(reversed(nodes))]:
            for resource in capacities.used(*ends):
                gbit = (problem.costs.activation_bytes or 0) * 8e-9
                carried_s[resource] += gbit / capacities.gbit_per_s[resource]
    carried = loads.rows[CARRIED]
    assert sorted(carried[carried > 0]) == pytest.approx(sorted(filter(None, carried_s.values())))


def test_a_ring_counts_less_with_every_replica_that_comes_nearer() -> None:
    """Its slowest message stays as slow until the last of them is near."""
    content = reducing(0, (5, 4, 1), "ring", even=True).model_dump()
    near = {f"node-{index}" for index in range(5)}
    for source, row in content["costs"]["gbit_per_s"].items():
        row |= {sink: 0.1 for sink in row if (source in near) != (sink in near)}
    slot_model = SlotModel(Problem.model_validate(content | {"stage_bytes": (10**9, 1, 1)}))
    counted_s, exact_s = [], []
    for far in (2, 1, 0):
        placement = (*range(5 - far), *range(5, 5 + far), *range(5 - far, 5), *range(5 + far, 10))
        search = LocalSearch(slot_model, 0)
        search.start(placement, balanced_routes(slot_model, 0))
        loads = empty_loads(search.instance, 0)
        anneal_loads(search.instance, search.current, search.work, search.queue.sharing, loads, COUNTED)
        counted_s.append(float(loads.rows[SUMS, REDUCTIONS]))
        exact_s.append(slot_model.problem.reduce_s(slot_model.stages(order_replicas(slot_model, placement)))[0])
    assert exact_s[0] == exact_s[1] > exact_s[2]
    assert counted_s[0] >= counted_s[1] > counted_s[2]
    assert counted_s == sorted(counted_s, reverse=True)
    assert counted_s[2] == pytest.approx(exact_s[2], rel=1e-3)


@pytest.mark.parametrize("contention", ["none", "link", "node", "shared"])
def test_loads_after_many_exchanges_are_those_counted_anew(contention: Contention) -> None:
    """Only what an exchange of nodes changes is counted again, and one that is refused leaves no trace."""
    problem = share_links(make_problem(2, [2, 3, 2], 3, 8, fixed=False), contention)
    search, solution = begin(problem)
    loads = empty_loads(search.instance, search.queue.sharing.resources.shape[1])
    sharing, work, changed = search.queue.sharing, search.work, search.current
    value_s = anneal_loads(
        search.instance, changed, work, sharing, loads, COUNTED._replace(steps=500, exchange_share=0.6)
    )
    counted = loads.rows[:KEPT].copy()
    anew_s = anneal_loads(search.instance, changed, work, sharing, loads, COUNTED)
    assert tuple(changed.placement.tolist()) != solution.placement
    assert value_s == pytest.approx(anew_s)
    in_seconds = [row for row in range(KEPT) if row not in (SHARE, SUMS, CARRIED_SHARE)]
    assert counted[in_seconds] == pytest.approx(loads.rows[in_seconds])


@pytest.mark.parametrize("contention", ["link", "shared"])
def test_a_link_that_carries_one_message_at_a_time_is_a_load(contention: Contention) -> None:
    """A slow link between two fast cards takes its time for every message, however many cards there are."""
    problem = share_links(make_problem(2, [2, 3, 2], 3, 8, fixed=False), contention)
    search, solution = begin(problem)
    resources = search.queue.sharing.resources.shape[1]
    loads = empty_loads(search.instance, resources)
    value_s = anneal_loads(search.instance, search.current, search.work, search.queue.sharing, loads, COUNTED)
    sent: Counter[tuple[int, int]] = Counter()
    for route in solution.routes:
        for ends in zip(route, (*route[1:], route[0]), strict=True):
            sent.update((ends, ends[::-1]))
    assert {ends: loads.messages[ends] for ends in sent} == sent
    longest_s = max(
        count * problem.costs.occupancy_s(*(problem.nodes[solution.placement[slot]] for slot in ends))
        for ends, count in sent.items()
    )
    assert longest_s <= value_s
