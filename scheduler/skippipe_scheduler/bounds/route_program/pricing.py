"""Cheapest routes when holding a microbatch and working on it have prices: the subproblem of the route program.

A route costs, at each of its nodes, the node's holding price times the seconds from its forward's start to its
backward's end there, a price for the visit, and a price for its number of stages. Holding grows with all that comes
later on the route, so the state of the dynamic program would include the sum of holding prices so far, a real number.
For given state and node the least cost of the rest is a minimum of linear functions of that sum, hence concave: linear
interpolation between the points of a grid never exceeds it. So the result is a lower bound, and a close one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from skippipe_scheduler.bounds.network import Matrix, Network, Vector

Cube = npt.NDArray[np.float64]
NO_WAY = 1e12
"""Cost of what is not allowed; finite, so that interpolation stays defined."""
_GRID = 32
"""Points of the grid of holding prices. Chosen: interpolation between them loses little, and time grows with them."""


@dataclass(frozen=True)
class Prices:
    """Prices by class and node, and by length of the route (in the order of `rules.lengths`)."""

    holding: Matrix
    """Per second."""
    visit: Matrix
    length: dict[int, float]


@dataclass(frozen=True)
class PricedRoute:
    """Classes, nodes and cost of a route; `origin` counts the nodes that can be origins."""

    origin: int
    classes: tuple[int, ...]
    nodes: tuple[int, ...]
    cost: float


class PricedRoutes(Protocol):
    """What the route program asks of priced routes."""

    def least(self) -> Vector:
        """Return for each origin a lower bound of the cost of its routes."""

    def routes(self, origin: int, most: int) -> list[PricedRoute]:
        """Return cheap routes of an origin, at most `most`, cheapest first."""


class Pricing:
    """The least costs of the rest of a route from every state, for one set of prices."""

    def __init__(self, network: Network, prices: Prices) -> None:
        self.network, self.prices = network, prices
        self.grid = max(self._highest_sum(), 1e-12) * np.linspace(0.0, 1.0, _GRID) ** 2
        self.apart = np.zeros_like(network.both_ways_s)
        np.fill_diagonal(self.apart, NO_WAY)
        self.rest: list[Cube] = [np.empty(0)] * len(network.automaton.stage)
        for state in reversed(range(len(self.rest))):
            self.rest[state] = self._rest(state)

    def _highest_sum(self) -> float:
        """Return a sum of holding prices that no route exceeds."""
        highest = sorted((float(row.max()) for row in self.prices.holding), reverse=True)
        visits = self.network.problem.rules.route_length
        return sum(highest[:visits]) if self.network.by_stage else float(visits * highest[0])

    def least(self) -> Vector:
        """Return for each origin a lower bound of the cost of its routes."""
        origins, prices = self.network.origins, self.prices
        held = prices.holding[0][origins]
        own = held * self.network.work_s[0][origins] + prices.visit[0][origins]
        rows = np.arange(len(origins))
        start: Vector = own + self._at(self.rest[0][rows, rows], held)
        return start

    def _at(self, values: Cube, sums: npt.NDArray[np.float64]) -> Vector:
        """Interpolate `values` (last axis: the grid) at one sum for each row."""
        place, part = self._place(sums)
        rows = np.arange(len(sums))
        result: Vector = (1 - part) * values[rows, place] + part * values[rows, place + 1]
        return result

    def _place(self, sums: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
        """Return between which points of the grid the sums lie, and how far; beyond the last counts as the last."""
        place = np.clip(np.searchsorted(self.grid, sums, side="right") - 1, 0, _GRID - 2)
        part = (sums - self.grid[place]) / (self.grid[place + 1] - self.grid[place])
        return place, np.minimum(part, 1.0)

    def _rest(self, state: int) -> Cube:
        """Return the least cost of the rest by origin, node and sum of holding prices, the node's own included."""
        network = self.network
        automaton, origins = network.automaton, network.origins
        here = network.nodes_of[automaton.stage[state]]
        best = np.full((len(origins), len(here), _GRID), NO_WAY)
        if automaton.accepts[state]:
            closing_s = network.both_ways_s[np.ix_(here, origins)].T + network.loss_s[origins][:, None]
            best = closing_s[:, :, None] * self.grid + self.prices.length[automaton.length[state]]
        for successor in automaton.next_states[state]:
            there = network.nodes_of[automaton.stage[successor]]
            entered = self._entered(successor)
            hops = network.both_ways_s[np.ix_(here, there)][:, :, None] * self.grid
            hops += self.apart[np.ix_(here, there)][:, :, None]
            for origin in range(len(origins)):
                best[origin] = np.minimum(best[origin], (hops + entered[origin]).min(axis=1))
        return best

    def _entered(self, state: int) -> Cube:
        """Return the cost of entering each node of a state and the rest from there, by the sum before it."""
        network = self.network
        stage = network.automaton.stage[state]
        nodes = network.nodes_of[stage]
        held = self.prices.holding[stage][nodes]
        sums = self.grid + held[:, None]
        place, part = self._place(sums)
        rest, rows = self.rest[state], np.arange(len(nodes))[:, None]
        after = (1 - part) * rest[:, rows, place] + part * rest[:, rows, place + 1]
        entered: Cube = after + sums * network.work_s[stage][nodes][:, None] + self.prices.visit[stage][nodes][:, None]
        entered[network.origins[:, None] == nodes] = NO_WAY
        return entered

    def routes(self, origin: int, most: int) -> list[PricedRoute]:
        """Return cheap routes of an origin, at most `most`: the best for each first hop, cheapest first."""
        start = int(self.network.origins[origin])
        held = float(self.prices.holding[0][start])
        hops = sorted(self._hops(origin, 0, start, held))[:most]
        found = (self._follow(origin, state, node) for cost, state, node in hops if cost < NO_WAY / 2)
        return sorted((route for route in found if route is not None), key=lambda route: route.cost)

    def _hops(self, origin: int, state: int, node: int, held: float) -> list[tuple[float, int, int]]:
        """Return the ways to go on: cost of the rest, next state and node (state -1: home)."""
        network = self.network
        automaton, home = network.automaton, int(network.origins[origin])
        ways: list[tuple[float, int, int]] = []
        if automaton.accepts[state]:
            closing_s = float(network.both_ways_s[node, home] + network.loss_s[home])
            ways.append((held * closing_s + self.prices.length[automaton.length[state]], -1, home))
        for successor in automaton.next_states[state]:
            stage = automaton.stage[successor]
            nodes = network.nodes_of[stage]
            sums = held + self.prices.holding[stage][nodes]
            costs = held * network.both_ways_s[node, nodes] + self.apart[node, nodes]
            costs = costs + sums * network.work_s[stage][nodes] + self.prices.visit[stage][nodes]
            costs = costs + self._at(self.rest[successor][origin], sums) + NO_WAY * (nodes == home)
            ways += [(float(cost), successor, int(reached)) for cost, reached in zip(costs, nodes, strict=True)]
        return ways

    def _follow(self, origin: int, state: int, node: int) -> PricedRoute | None:
        """Return the route that goes on from the first hop in the cheapest way."""
        network, prices = self.network, self.prices
        classes, nodes = [0, network.automaton.stage[state]], [int(network.origins[origin]), node]
        while True:
            held = sum(float(prices.holding[stage, at]) for stage, at in zip(classes, nodes, strict=True))
            cost, state, node = min(self._hops(origin, state, nodes[-1], held))
            if cost >= NO_WAY / 2:
                return None
            if state < 0:
                break
            classes.append(network.automaton.stage[state])
            nodes.append(node)
        return PricedRoute(origin, tuple(classes), tuple(nodes), self._cost(origin, classes, nodes))

    def _cost(self, origin: int, classes: Sequence[int], nodes: Sequence[int]) -> float:
        held_s = residences_s(self.network, origin, classes, nodes)
        places = list(zip(classes, nodes, strict=True))
        holding = sum(
            float(self.prices.holding[place]) * held_here_s for place, held_here_s in zip(places, held_s, strict=True)
        )
        return holding + sum(float(self.prices.visit[place]) for place in places) + self.prices.length[len(nodes)]


def residences_s(network: Network, origin: int, classes: Sequence[int], nodes: Sequence[int]) -> list[float]:
    """Return for each node of a route the least seconds from its forward's start to its backward's end there."""
    home = int(network.origins[origin])
    rest_s = float(network.both_ways_s[nodes[-1], home] + network.loss_s[home])
    residences = []
    for position in reversed(range(len(nodes))):
        rest_s += float(network.work_s[classes[position]][nodes[position]])
        residences.append(rest_s)
        if position:
            rest_s += float(network.both_ways_s[nodes[position - 1], nodes[position]])
    return residences[::-1]
