from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_problems import make_problem, problems

from skippipe_scheduler.order import build, fits_memory, retime
from skippipe_scheduler.routes import balanced_routes
from skippipe_scheduler.slots import Layout, SlotCosts


def setting(problem, seed=0):
    layout = Layout(problem)
    placement = layout.given_placement() or tuple(range(len(problem.nodes)))
    return SlotCosts(layout, placement), balanced_routes(layout, seed)


def assert_consistent(timeline, routes):
    costs = timeline.costs
    for row, route in zip(timeline.starts, routes, strict=True):
        chain = costs.chain(route)
        for index in range(2 * len(route)):
            arrival_s = row[index] + chain.durations_s[index] + chain.delays_s[index]
            assert row[index + 1] >= arrival_s - 1e-9
    for begins, ends in zip(timeline.busy_from, timeline.busy_to, strict=True):
        assert begins == sorted(begins)
        assert all(end <= begin + 1e-9 for end, begin in zip(ends, begins[1:], strict=False))
    assert fits_memory(timeline)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems(), st.integers(0, 5), st.floats(0, 5))
def test_insertion_respects_nodes_memory_and_transfers(problem, seed, wait_s):
    costs, routes = setting(problem, seed)
    timeline = build(costs, routes, range(len(routes)), wait_s)
    assert_consistent(timeline, routes)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(problems())
def test_taking_out_and_inserting_again_stays_consistent(problem):
    costs, routes = setting(problem)
    full = build(costs, routes, range(len(routes)), 1.0)
    before = [list(row) for row in full.starts]
    part = full.without(routes, [0])
    assert part.starts[0] == []
    assert sum(map(len, full.busy_from)) - sum(map(len, part.busy_from)) == 2 * len(routes[0]) + 1
    part.insert(0, routes[0], 1.0)
    assert_consistent(part, routes)
    assert full.starts == before


def test_one_microbatch_takes_its_round_trip():
    costs, routes = setting(make_problem(3, [1, 1, 1], 3, 1))
    timeline = build(costs, routes, [0], 0.0)
    end_s = timeline.starts[0][-1] + costs.backward_s[0]
    assert end_s == pytest.approx(costs.chain(routes[0]).round_trip_s)


def test_memory_of_one_makes_microbatches_follow_each_other():
    costs, routes = setting(make_problem(3, [1, 1], 2, 3, memory=1))
    timeline = build(costs, routes, [0, 1, 2], 10.0)
    held = timeline.held[0]
    assert all(end <= start + 1e-9 for (_, end), (start, _) in pairwise(held))


def test_retiming_closes_gaps_and_never_delays():
    costs, routes = setting(make_problem(3, [2, 2], 2, 4))
    timeline = build(costs, routes, range(4), 1.0)
    later = [[2 * start + 7 for start in row] for row in timeline.starts]
    again = retime(costs, routes, later)
    assert again.starts == timeline.starts


def test_more_than_the_memory_is_noticed():
    costs, routes = setting(make_problem(3, [1, 1], 2, 3, memory=2))
    crowded = [[0.0, 10.0, 20.0, 30.0, 40.0], [1.0, 11.0, 21.0, 31.0, 41.0], [2.0, 12.0, 22.0, 32.0, 42.0]]
    assert not fits_memory(retime(costs, routes, crowded))
