"""Which node holds which stage: the genetic algorithm that SkipPipe (arXiv 2502.19913) takes from DT-FM.

DT-FM is "Decentralized Training of Foundation Models in Heterogeneous Environments" (arXiv 2206.01288, section 3).
Nodes are divided into groups; data parallelism costs the slowest edge within a group, pipeline parallelism twice the
best tour over the groups, where two groups are as far apart as the slowest edge of their bottleneck matching.

Left open by the papers, and chosen here: an edge is the mean time of one activation there and back. Groups of unequal
size are matched as far as the smaller one goes. A tour is open, begins at stage 0, and takes at each position a group
of that position's size; beyond `MAX_EXACT_STAGES` stages it goes to the nearest group. A child replaces the worst of
the population when it is better and new. Pinned nodes, which the papers do not know, change places at the end.
"""

import random
from itertools import combinations

import networkx as nx

from skippipe_scheduler.budget import Budget
from skippipe_scheduler.slots.placement import with_pins
from skippipe_scheduler.slots.slot_model import SlotModel, SlotPlacement

MAX_EXACT_STAGES = 12
"""Stages up to which the tour is exact: it takes 2^stages steps. Chosen."""
_POPULATION = 40
"""Individuals that are kept. Chosen: the papers do not say, as for the next two."""
_CUTS = 5
"""Places at which a child changes from one parent to the other."""
_EXCHANGES = 4
"""Cyclic exchanges that the local search tries on each child."""

Groups = tuple[frozenset[int], ...]
"""Nodes (ranks) of each group; the first is stage 0, the others have no order yet."""


def genetic_placement(slot_model: SlotModel, budget: Budget, seed: int) -> SlotPlacement:
    """Return the best placement found within `budget`, whose steps are children bred."""
    search = _GeneticAlgorithm(slot_model, random.Random(seed))
    search.breed(budget)
    _, order, groups = search.population[0]
    return with_pins(slot_model, tuple(node for index in order for node in sorted(groups[index])))


class _GeneticAlgorithm:
    def __init__(self, slot_model: SlotModel, generator: random.Random) -> None:
        transfer_s = slot_model.transfer_s
        self.sizes = slot_model.problem.sizes
        self.generator = generator
        self.edge_s: list[list[float]] = ((transfer_s + transfer_s.T) / 2).tolist()
        self.apart_s: dict[tuple[frozenset[int], frozenset[int]], float] = {}
        self.population: list[tuple[float, tuple[int, ...], Groups]] = []
        """(cost in seconds, groups in the order of the tour, groups), best first."""

    def breed(self, budget: Budget) -> None:
        """Fill the population, then let pairs have children until the budget ends; always makes one individual."""
        nodes = list(range(len(self.edge_s)))
        while not self.population or (len(self.population) < _POPULATION and not budget.exhausted):
            self.generator.shuffle(nodes)
            self._admit(self._cut(nodes))
            budget.spent += 1
        while not budget.exhausted:
            first, second = self.generator.choices(self.population, k=2)
            self._admit(self._improved(self._crossed(first[2], second[2])))
            budget.spent += 1

    def _cut(self, nodes: list[int]) -> Groups:
        ends = [sum(self.sizes[: stage + 1]) for stage in range(len(self.sizes))]
        return tuple(frozenset(nodes[end - size : end]) for end, size in zip(ends, self.sizes, strict=True))

    def _admit(self, groups: Groups) -> None:
        cost_s, order = self._cost(groups)
        individual = (cost_s, order, groups)
        if any(known[2] == groups for known in self.population):
            return
        if len(self.population) == _POPULATION:
            if cost_s >= self.population[-1][0]:
                return
            self.population.pop()
        self.population.append(individual)
        self.population.sort(key=lambda individual: individual[0])

    def _crossed(self, first: Groups, second: Groups) -> Groups:
        """Take the group of each node from one parent or the other, changing at five cuts, then repair the sizes."""
        nodes = len(self.edge_s)
        cuts = sorted(self.generator.sample(range(1, nodes), min(_CUTS, nodes - 1)))
        held: list[list[int]] = [[] for _ in self.sizes]
        for node in range(nodes):
            parent = (first, second)[sum(cut <= node for cut in cuts) % 2]
            held[next(index for index, group in enumerate(parent) if node in group)].append(node)
        homeless: list[int] = []
        for group, size in zip(held, self.sizes, strict=True):
            self.generator.shuffle(group)
            homeless += group[size:]
            del group[size:]
        self.generator.shuffle(homeless)
        for group, size in zip(held, self.sizes, strict=True):
            while len(group) < size:
                group.append(homeless.pop())
        return tuple(map(frozenset, held))

    def _improved(self, groups: Groups) -> Groups:
        """Pass one node on around two or three groups, as often as that lowers the cost."""
        cost_s, _ = self._cost(groups)
        for _ in range(_EXCHANGES):
            ring = self.generator.sample(range(len(groups)), min(len(groups), self.generator.choice((2, 3))))
            given = [self.generator.choice(sorted(groups[index])) for index in ring]
            trial = list(groups)
            for position, index in enumerate(ring):
                trial[index] = groups[index] - {given[position]} | {given[position - 1]}
            trial_s, _ = self._cost(tuple(trial))
            if trial_s < cost_s:
                groups, cost_s = tuple(trial), trial_s
        return groups

    def _cost(self, groups: Groups) -> tuple[float, tuple[int, ...]]:
        within_s = max((self.edge_s[a][b] for group in groups for a, b in combinations(sorted(group), 2)), default=0.0)
        apart_s = [[0.0] * len(groups) for _ in groups]
        for a, b in combinations(range(len(groups)), 2):
            apart_s[a][b] = apart_s[b][a] = self._bottleneck_s(groups[a], groups[b])
        tour_s, order = shortest_tour(apart_s, self.sizes)
        return within_s + 2 * tour_s, order

    def _bottleneck_s(self, first: frozenset[int], second: frozenset[int]) -> float:
        if (first, second) not in self.apart_s:
            self.apart_s[first, second] = bottleneck_matching_s(self.edge_s, sorted(first), sorted(second))
        return self.apart_s[first, second]


def bottleneck_matching_s(edge_s: list[list[float]], first: list[int], second: list[int]) -> float:
    """Return the least possible slowest edge of a matching that covers the smaller of two groups of nodes."""
    weights_s = sorted({edge_s[a][b] for a in first for b in second})
    low, high = 0, len(weights_s) - 1
    while low < high:
        middle = (low + high) // 2
        graph: nx.Graph[int] = nx.Graph()
        graph.add_nodes_from([*first, *second])
        graph.add_edges_from((a, b) for a in first for b in second if edge_s[a][b] <= weights_s[middle])
        matching = nx.bipartite.hopcroft_karp_matching(graph, top_nodes=first)
        if len(matching) // 2 == min(len(first), len(second)):
            high = middle
        else:
            low = middle + 1
    return weights_s[low]


def shortest_tour(apart_s: list[list[float]], sizes: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
    """Return length and order of the shortest open tour over the groups from group 0 on.

    A group can only stand where a group of its size has to stand. Exact by dynamic programming over subsets (Held and
    Karp 1962) up to `MAX_EXACT_STAGES` groups, else the nearest group comes next.
    """
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(1, 0): (0.0, (0,))}
    for position in range(1, len(sizes)):
        longer: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (visited, last), (length_s, order) in best.items():
            for index, size in enumerate(sizes):
                if visited >> index & 1 or size != sizes[position]:
                    continue
                found = (length_s + apart_s[last][index], (*order, index))
                key = (visited | 1 << index, index)
                if key not in longer or found < longer[key]:
                    longer[key] = found
        best = longer if len(sizes) <= MAX_EXACT_STAGES else dict([min(longer.items(), key=lambda item: item[1])])
    return min(best.values())
