"""All legal routes in arrays, where they are few: then the cheapest are found by looking at each, and no route of a
free placement visits a node twice.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from skippipe_scheduler.bounds.automaton import Automaton
from skippipe_scheduler.bounds.network import Indices, Mask, Matrix, Network, Vector
from skippipe_scheduler.bounds.route_program.pricing import PricedRoute, Prices

MOST_ROUTES = 200_000
"""Routes up to which all are listed. Chosen: some tens of MiB, and a look at all takes milliseconds."""
MOST_SEQUENCES = 2_000
"""Sequences of classes up to which they are. Chosen: arrays hold the routes of one, so that each look takes as many
steps of Python; with one node a stage there would be as many sequences as routes."""


def number_of_walks(network: Network) -> float:
    """Return how many routes there are, those that visit a node twice included."""
    return _ways(network.automaton, [len(nodes) for nodes in network.nodes_of])


def _ways(automaton: Automaton, choices: Sequence[int]) -> float:
    """Return how many ways lead through the automaton, with so many `choices` at a visit of each class."""
    ways = [float(accepts) for accepts in automaton.accepts]
    for state in reversed(range(len(ways))):
        ways[state] += sum(ways[successor] for successor in automaton.next_states[state])
        ways[state] *= choices[automaton.stage[state]]
    return ways[0]


def listed_routes(network: Network) -> "ListedRoutes | None":
    """Return all legal routes, or None where they or their sequences are many."""
    few = (
        number_of_walks(network) <= MOST_ROUTES
        and _ways(network.automaton, [1] * len(network.nodes_of)) <= MOST_SEQUENCES
    )
    return ListedRoutes(network) if few else None


class ListedRoutes:
    """Every legal route of a network with at most `MOST_ROUTES` walks, by sequence of classes."""

    def __init__(self, network: Network) -> None:
        self.network = network
        place_of = np.full(len(network.problem.nodes), -1)
        place_of[network.origins] = np.arange(len(network.origins))
        self.groups = [_Group(network, classes, place_of) for classes in _accepted(network)]

    def trip_s(self, avoided: Mask) -> Vector:
        """Return for each origin the least round trip on routes that no node in `avoided` is on but as the origin."""
        best = np.full(len(self.network.origins), np.inf)
        for group in self.groups:
            clear = ~avoided[group.nodes[:, 1:]].any(axis=1)
            np.minimum.at(best, group.origin[clear], group.residence_s[clear, 0])
        return best

    def price(self, prices: Prices) -> "PricedList":
        """Return the routes with their costs."""
        return PricedList(self, [group.costs(prices) for group in self.groups])


class PricedList:
    """Listed routes and what each costs; has the interface of `Pricing`."""

    def __init__(self, listed: ListedRoutes, costs: list[Vector]) -> None:
        self.listed, self.costs = listed, costs

    def least(self) -> Vector:
        """Return for each origin the least cost of its routes."""
        best = np.full(len(self.listed.network.origins), np.inf)
        for group, costs in zip(self.listed.groups, self.costs, strict=True):
            np.minimum.at(best, group.origin, costs)
        return best

    def routes(self, origin: int, most: int) -> list[PricedRoute]:
        """Return the cheapest routes of an origin, at most `most` of each sequence of classes, cheapest first."""
        found = []
        for group, costs in zip(self.listed.groups, self.costs, strict=True):
            own = slice(*np.searchsorted(group.origin, [origin, origin + 1]))
            for index in own.start + np.argsort(costs[own], kind="stable")[:most]:
                nodes = tuple(int(node) for node in group.nodes[index])
                found.append(PricedRoute(origin, group.classes, nodes, float(costs[index])))
        return sorted(found, key=lambda route: route.cost)[:most]


class _Group:
    """The routes of one sequence of classes, ordered by origin."""

    def __init__(self, network: Network, classes: tuple[int, ...], place_of: Indices) -> None:
        self.classes = classes
        axes = np.meshgrid(*(network.nodes_of[stage] for stage in classes), indexing="ij")
        nodes = np.stack([axis.ravel() for axis in axes], axis=1)
        ordered = np.sort(nodes, axis=1)
        self.nodes = nodes[(ordered[:, 1:] != ordered[:, :-1]).all(axis=1)]
        self.origin = place_of[self.nodes[:, 0]]
        self.residence_s = self._residences_s(network)

    def _residences_s(self, network: Network) -> Matrix:
        """Return by route and hop the least seconds from the forward's start to the backward's end."""
        nodes = self.nodes
        residence_s = np.empty(nodes.shape)
        rest_s = network.both_ways_s[nodes[:, -1], nodes[:, 0]] + network.loss_s[nodes[:, 0]]
        for hop in reversed(range(nodes.shape[1])):
            rest_s = rest_s + network.work_s[self.classes[hop]][nodes[:, hop]]
            residence_s[:, hop] = rest_s
            if hop:
                rest_s = rest_s + network.both_ways_s[nodes[:, hop - 1], nodes[:, hop]]
        return residence_s

    def costs(self, prices: Prices) -> Vector:
        """Return the cost of every route."""
        costs = np.full(len(self.nodes), prices.length[len(self.classes)])
        for hop, stage in enumerate(self.classes):
            at = self.nodes[:, hop]
            costs += prices.holding[stage][at] * self.residence_s[:, hop] + prices.visit[stage][at]
        return costs


def _accepted(network: Network) -> Iterator[tuple[int, ...]]:
    """Yield every accepted sequence of classes."""
    automaton = network.automaton
    paths: list[tuple[int, tuple[int, ...]]] = [(0, (0,))]
    while paths:
        state, classes = paths.pop()
        if automaton.accepts[state]:
            yield classes
        paths += [(successor, (*classes, automaton.stage[successor])) for successor in automaton.next_states[state]]
