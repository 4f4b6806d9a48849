"""The loads that a start is balanced by: what cards carry and what reductions take, as the exact times have it."""

from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
from small_problems import make_problem, share_links
from test_kernel import begin
from test_reduction import reducing

from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.search.kernel.loads import ROWS, anneal_loads
from skippipe_scheduler.search.local_search import LocalSearch
from skippipe_scheduler.slots.replica_order import order_replicas
from skippipe_scheduler.slots.routes import balanced_routes
from skippipe_scheduler.slots.slot_model import SlotModel

OUT, IN, SUMS, CARRIED = 2, 3, 5, 6
REDUCTIONS = 2


def test_a_card_carries_all_that_its_routes_send_and_receive() -> None:
    problem = share_links(make_problem(2, [2, 3, 2], 3, 8, fixed=False), "node")
    search, solution = begin(problem)
    loads = np.zeros((ROWS, 7))
    anneal_loads(search.instance, search.current, search.work, search.queue.sharing, loads, 0, 0.1, 0.1, 0.0, 1.0)
    sent_s: defaultdict[int, float] = defaultdict(float)
    received_s: defaultdict[int, float] = defaultdict(float)
    for route in solution.routes:
        there = list(zip(route, (*route[1:], route[0]), strict=True))
        for source, sink in [*there, *((sink, source) for source, sink in there)]:
            names = [problem.nodes[solution.placement[slot]] for slot in (source, sink)]
            occupied_s = problem.costs.occupancy_s(*names)
            sent_s[source] += occupied_s
            received_s[sink] += occupied_s
    assert loads[OUT].tolist() == pytest.approx([sent_s[slot] for slot in range(7)])
    assert loads[IN].tolist() == pytest.approx([received_s[slot] for slot in range(7)])


def test_cards_and_uplinks_carry_all_that_goes_through_them() -> None:
    problem = share_links(make_problem(2, [2, 3, 2], 3, 8, fixed=False), "shared")
    search, solution = begin(problem)
    resources = search.queue.sharing.resources.shape[1]
    loads = np.zeros((ROWS, resources))
    anneal_loads(search.instance, search.current, search.work, search.queue.sharing, loads, 0, 0.1, 0.1, 0.0, 1.0)
    capacities = problem.costs.shared_capacities()
    carried_s = dict.fromkeys(capacities.gbit_per_s, 0.0)
    for route in solution.routes:
        nodes = [problem.nodes[solution.placement[slot]] for slot in (*route, route[0])]
        for ends in [*pairwise(nodes), *pairwise(reversed(nodes))]:
            for resource in capacities.used(*ends):
                gbit = (problem.costs.activation_bytes or 0) * 8e-9
                carried_s[resource] += gbit / capacities.gbit_per_s[resource]
    assert sorted(loads[CARRIED][loads[CARRIED] > 0]) == pytest.approx(sorted(filter(None, carried_s.values())))


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
        loads = np.zeros((ROWS, 10))
        anneal_loads(search.instance, search.current, search.work, search.queue.sharing, loads, 0, 0.1, 0.1, 0.0, 1.0)
        counted_s.append(float(loads[SUMS, REDUCTIONS]))
        exact_s.append(slot_model.problem.reduce_s(slot_model.stages(order_replicas(slot_model, placement)))[0])
    assert exact_s[0] == exact_s[1] > exact_s[2]
    assert counted_s[0] >= counted_s[1] > counted_s[2]
    assert counted_s == sorted(counted_s, reverse=True)
    assert counted_s[2] == pytest.approx(exact_s[2], rel=1e-3)
