"""The parts of the bounds against brute force."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from small_problems import alike, given_placement, make_problem, problems, slot_costs

from skippipe_scheduler.bounds.automaton import Automaton, any_sequence, legal_sequences
from skippipe_scheduler.bounds.network import Network
from skippipe_scheduler.bounds.route_program.listed_routes import (
    MOST_ROUTES,
    ListedRoutes,
    listed_routes,
    number_of_walks,
)
from skippipe_scheduler.bounds.route_program.pricing import Prices, Pricing, residences_s
from skippipe_scheduler.bounds.shares import least_linear_time_s, least_time_of_best_s, least_time_s
from skippipe_scheduler.bounds.walks import idle_ends, shortest_trips
from skippipe_scheduler.bounds.work import window_s
from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.problem.sequences.listed_sequences import stage_sequences


def accepted(automaton: Automaton) -> list[tuple[int, ...]]:
    """Return every accepted path as stages."""
    paths: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((0,), (0,))]
    found = []
    while paths:
        states, stages = paths.pop()
        if automaton.accepts[states[-1]]:
            found.append(stages)
        for successor in automaton.next_states[states[-1]]:
            paths.append(((*states, successor), (*stages, automaton.stage[successor])))
    return sorted(found)


@settings(max_examples=150, derandomize=True)
@given(st.integers(2, 7), st.data())
def test_the_automaton_accepts_the_legal_sequences(num_stages: int, data: st.DataObject) -> None:
    lengths = data.draw(st.sets(st.integers(2, num_stages), min_size=1, max_size=2))
    rules = Rules(
        num_stages=num_stages,
        route_length=max(lengths),
        route_lengths=dict.fromkeys(lengths, 1),
        max_swaps=data.draw(st.integers(0, 3)),
        max_swap_distance=data.draw(st.integers(0, 3)),
        max_forward_jump=data.draw(st.integers(1, 4)),
        protected_stages=tuple(data.draw(st.sets(st.integers(0, num_stages - 1), max_size=2))),
    )
    automaton = legal_sequences(rules)
    assert automaton is not None
    assert accepted(automaton) == sorted(stage_sequences(rules))


def test_the_automaton_stays_small_where_sequences_are_many() -> None:
    rules = Rules(num_stages=24, route_length=16, max_swaps=2, max_forward_jump=4)
    automaton = legal_sequences(rules)
    assert automaton is not None
    assert len(automaton.stage) < 2000
    assert len(any_sequence(rules).stage) == 16


def routes_of(network: Network) -> Iterator[tuple[int, Sequence[int], Sequence[int]]]:
    """Return every route of the network as (origin, classes, nodes)."""
    for origin, home in enumerate(network.origins):
        for classes in accepted(network.automaton):
            for rest in itertools.product(*(network.nodes_of[kind] for kind in classes[1:])):
                nodes = (int(home), *map(int, rest))
                apart = all(a != b for a, b in itertools.pairwise((*nodes, int(home))))
                if apart and int(home) not in rest:
                    yield origin, classes, nodes


@settings(max_examples=25, derandomize=True)
@given(problems())
def test_shortest_trips_are_those_of_the_shortest_routes(problem: Problem) -> None:
    network = Network(problem)
    trips = shortest_trips(network)
    best = np.full(len(network.origins), np.inf)
    for origin, classes, nodes in routes_of(network):
        best[origin] = min(best[origin], residences_s(network, origin, classes, nodes)[0])
    assert trips.trip_s == pytest.approx(best)
    own_s = network.work_s[0][network.origins] + network.loss_s[network.origins]
    assert (trips.out_s + trips.home_s <= trips.trip_s - own_s + 1e-9).all()


@settings(max_examples=25, derandomize=True)
@given(st.integers(0, 1000), st.sets(st.integers(0, 4), max_size=2))
def test_trips_avoid_other_origins(seed: int, chosen: set[int]) -> None:
    network = Network(make_problem(seed, [1, 2, 1, 1], 3, 2, fixed=False))
    avoided = np.isin(np.arange(5), list(chosen))
    best, apart = np.full(5, np.inf), np.full(5, np.inf)
    for origin, classes, nodes in routes_of(network):
        if not chosen.intersection(nodes[1:]):
            trip_s = residences_s(network, origin, classes, nodes)[0]
            best[origin] = min(best[origin], trip_s)
            if len(set(nodes)) == len(nodes):
                apart[origin] = min(apart[origin], trip_s)
    assert shortest_trips(network, avoided).trip_s == pytest.approx(best)
    assert ListedRoutes(network).trip_s(avoided) == pytest.approx(apart)


def test_nodes_that_are_alike_can_be_exchanged() -> None:
    problem = alike(make_problem(3, [2, 2, 2], 3, 4, fixed=False))
    first = Network(problem).alike
    slow = [problem.costs.forward_s[name] for name in problem.nodes]
    assert [slow.index(seconds) for seconds in slow] == list(first)
    memory = problem.costs.memory | {problem.nodes[5]: 9}
    changed = problem.model_copy(update={"costs": problem.costs.model_copy(update={"memory": memory})})
    assert list(Network(changed).alike) == [*first[:5], 5]


@settings(max_examples=25, derandomize=True)
@given(problems(), st.integers(0, 1000))
def test_priced_routes_are_close_below_the_cheapest(problem: Problem, seed: int) -> None:
    network = Network(problem)
    rng = np.random.default_rng(seed)
    shape = (len(network.nodes_of), len(network.problem.nodes))
    prices = Prices(
        rng.random(shape) * (rng.random(shape) < 0.5),
        rng.normal(size=shape),
        {length: float(rng.normal()) for length in problem.rules.lengths},
    )
    best = np.full(len(network.origins), np.inf)
    for origin, classes, nodes in routes_of(network):
        held_s = residences_s(network, origin, classes, nodes)
        cost = prices.length[len(nodes)] + sum(
            prices.holding[place] * each_s + prices.visit[place]
            for place, each_s in zip(zip(classes, nodes, strict=True), held_s, strict=True)
        )
        best[origin] = min(best[origin], cost)
    pricing = Pricing(network, prices)
    least = pricing.least()
    assert (least <= best + 1e-9).all()
    assert (least >= best - 0.02 * np.abs(best) - 0.2).all()
    found = [min(route.cost for route in pricing.routes(origin, 50)) for origin in range(len(best))]
    assert found == pytest.approx(best, rel=0.05, abs=0.2)
    listed = ListedRoutes(network).price(prices)
    assert (listed.least() >= best - 1e-9).all()
    if network.fixed:
        assert listed.least() == pytest.approx(best)


def test_listed_routes_visit_no_node_twice() -> None:
    problem = make_problem(2, [2, 2, 1, 1], 4, 4, fixed=False)
    network = Network(problem)
    listed = ListedRoutes(network)
    assert number_of_walks(network) == 6**4
    assert sum(len(group.nodes) for group in listed.groups) == 6 * 5 * 4 * 3
    everywhere = np.ones((2, 6))
    priced = listed.price(Prices(everywhere, everywhere, {4: 0.0}))
    routes = priced.routes(3, 7)
    assert len({route.nodes for route in routes}) == 7
    assert routes[0].cost == pytest.approx(priced.least()[3])
    held_s = residences_s(network, 3, routes[0].classes, routes[0].nodes)
    assert routes[0].cost == pytest.approx(sum(held_s) + 4)


def test_residences_are_those_of_the_chain() -> None:
    problem = make_problem(3, [1, 2, 2], 3, 4)
    network = Network(problem)
    slots = slot_costs(problem)
    for origin, classes, nodes in routes_of(network):
        route = tuple(given_placement(problem).index(node) for node in nodes)
        assert residences_s(network, origin, classes, nodes) == pytest.approx(slots.chain(route).residence_s)


def test_idle_ends_of_a_chain_of_nodes() -> None:
    problem = make_problem(0, [1, 1], 2, 1, reduce_s=0.5)
    network, (first, second) = Network(problem), problem.nodes
    costs, idle = problem.costs, idle_ends(network)
    assert idle.head_s[1, 1] == pytest.approx(costs.forward_s[first] + costs.transfer_s[first][second])
    assert idle.tail_s[1, 1] == pytest.approx(costs.transfer_s[second][first] + costs.backward_s[first] + 0.5)
    assert (idle.head_s[0, 0], idle.tail_s[0, 0]) == (0.0, 0.5)


@given(st.lists(st.floats(0.1, 5.0), min_size=1, max_size=4), st.integers(1, 8), st.data())
@settings(max_examples=50, derandomize=True)
def test_shares_are_the_best_division(each_s: list[float], items: int, data: st.DataObject) -> None:
    before_s = data.draw(st.lists(st.floats(0.0, 9.0), min_size=len(each_s), max_size=len(each_s)))

    def time_s(worker: int, count: int) -> float:
        return before_s[worker] + each_s[worker] * count if count else 0.0

    workers = range(len(each_s))
    divisions = [d for d in itertools.product(range(items + 1), repeat=len(each_s)) if sum(d) == items]
    best_s = min(max(map(time_s, workers, division)) for division in divisions)
    assert least_time_s(time_s, workers, items) == pytest.approx(best_s)
    chosen = data.draw(st.integers(1, len(each_s)))
    used = [division for division in divisions if sum(count > 0 for count in division) <= chosen]
    best_s = min(max(map(time_s, workers, division)) for division in used)
    assert least_time_of_best_s(time_s, workers, chosen, items) == pytest.approx(best_s, rel=1e-4)
    assert least_linear_time_s(np.array(before_s), np.array(each_s), chosen, items) == pytest.approx(best_s)


def test_a_window_loses_the_staggered_ends() -> None:
    assert window_s(1, 9.0, 0.5, 10.0) == 10.5
    assert window_s(3, 2.0, 0.0, 10.0) == 30.0 - 6.0
    assert window_s(9, 2.0, 0.0, 3.0) == 4.0


def test_routes_of_very_many_sequences_are_not_listed() -> None:
    """With one node a stage there are as many sequences as routes, and each would be looked at by itself."""
    network = Network(make_problem(0, [1] * 17, 13, 17))
    assert 10_000 < number_of_walks(network) < MOST_ROUTES
    assert listed_routes(network) is None
    assert listed_routes(Network(make_problem(0, [2] * 6, 4, 12))) is not None
