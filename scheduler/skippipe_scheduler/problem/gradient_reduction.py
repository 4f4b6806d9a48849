"""How long the all-reduce of a stage's gradients over its replicas takes, by its algorithm.

To add an algorithm, add its name to `Reduction`: mypy then names `reduction_s`, and the kernel, whose
`search.kernel.reduction_time` has the same algorithms compiled, fails to import until the name has its number
(`search.kernel.arrays`). The table of docs/plan-file.md describes them.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, assert_never

from skippipe_scheduler.problem.sharing.capacities import NO_CAPACITIES, SharedCapacities

Reduction = Literal["ring", "tree", "direct", "hierarchical"]
"""Algorithms of an all-reduce: round a ring, over a binomial tree, from everyone to everyone in two halves, or so in
each region and then between the regions."""
BY_ORDER: frozenset[Reduction] = frozenset({"ring", "tree"})
"""Those for which the planner chooses an order of the replicas."""


Ends = tuple[str, str]


@dataclass(frozen=True)
class LinkSpeeds:
    """Seconds and Gbit/s from node to node.

    Where `cards_shared`, the messages of a node leave one behind the other; `capacities` are shared fairly. `region_of`
    is the region of each node, for reductions by region.
    """

    latency_s: Mapping[str, Mapping[str, float]]
    gbit_per_s: Mapping[str, Mapping[str, float]]
    cards_shared: bool = False
    capacities: SharedCapacities = NO_CAPACITIES
    region_of: Mapping[str, str] = field(default_factory=dict)

    def wire_s(self, source: str, sink: str, gbit: float) -> float:
        """Return how long a message occupies the link."""
        return gbit / self.gbit_per_s[source][sink]

    def message_s(self, source: str, sink: str, gbit: float) -> float:
        """Return how long one message takes that is alone."""
        return self.latency_s[source][sink] + self.wire_s(source, sink, gbit)

    def together_s(self, messages: Sequence[Ends], gbit: float) -> float:
        """Return how long it takes until `messages` of equal size that leave at once are all there.

        Each has the bandwidth of its link, or an equal share of the busiest card or uplink that it uses. Max-min fair
        shares are never less, and those of what is full longest are no more.
        """
        if not self.capacities.gbit_per_s:
            return max(self.message_s(*ends, gbit) for ends in messages)
        users = Counter(resource for ends in messages for resource in self.capacities.used(*ends))

        def there_s(source: str, sink: str) -> float:
            shared_s = [
                gbit * users[resource] / self.capacities.gbit_per_s[resource]
                for resource in self.capacities.used(source, sink)
            ]
            return self.latency_s[source][sink] + max([self.wire_s(source, sink, gbit), *shared_s])

        return max(there_s(*ends) for ends in messages)

    def sent_s(self, messages: Sequence[Ends], gbit: float) -> float:
        """Return the same where messages of one node may queue at its card: then its greatest latency and all bytes."""
        if not messages:
            return 0.0
        if not self.cards_shared:
            return self.together_s(messages, gbit)
        sinks = defaultdict[str, list[str]](list)
        for source, sink in messages:
            sinks[source].append(sink)
        return max(
            max(self.latency_s[source][sink] for sink in row) + sum(self.wire_s(source, sink, gbit) for sink in row)
            for source, row in sinks.items()
        )


def reduction_s(kind: Reduction, links: LinkSpeeds, nodes: Sequence[str], gbit: float) -> float:
    """Return the seconds in which two or more `nodes` all-reduce `gbit` of gradients."""
    match kind:
        case "ring":
            return ring_s(links, nodes, gbit)
        case "tree":
            return tree_s(links, nodes, gbit)
        case "direct":
            return direct_s(links, nodes, gbit)
        case "hierarchical":
            return hierarchical_s(links, nodes, gbit)
        case _:
            assert_never(kind)


def ring_s(links: LinkSpeeds, nodes: Sequence[str], gbit: float) -> float:
    """Return 2 (R - 1) steps, each of the slowest neighbour's latency and 1/R of the bytes."""
    following = [*nodes[1:], nodes[0]]
    step_s = links.together_s([*zip(nodes, following, strict=True)], gbit / len(nodes))
    return 2 * (len(nodes) - 1) * step_s


def tree_s(links: LinkSpeeds, nodes: Sequence[str], gbit: float) -> float:
    """Return 2 ceil(log2 R) rounds of a binomial tree over the nodes in their order, the first its root.

    In round k = 0, 1, ... of the first half, node i + 2^k sends its sum to node i for every i that 2^(k+1) divides; the
    second half goes the same edges back, last round first, with the result. A round takes the slowest of its edges: its
    latency and all bytes. (Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in
    MPICH", 2005.)
    """
    total_s = 0.0
    stride = 1
    while stride < len(nodes):
        edges = list(zip(nodes[stride :: 2 * stride], nodes[:: 2 * stride], strict=False))
        total_s += links.together_s(edges, gbit)
        total_s += links.together_s([(receiver, sender) for sender, receiver in edges], gbit)
        stride *= 2
    return total_s


def direct_s(links: LinkSpeeds, nodes: Sequence[str], gbit: float) -> float:
    """Return two halves, in each of which every node sends 1/R of the bytes to every other, all at once.

    In the first half a node gets what it has to add up, in the second it sends its sums. A half takes its longest
    message; where messages queue at a node's card, its greatest latency and all its bytes.
    """
    pairs = [(source, sink) for source in nodes for sink in nodes if source != sink]
    return 2 * links.sent_s(pairs, gbit / len(nodes))


def hierarchical_s(links: LinkSpeeds, nodes: Sequence[str], gbit: float) -> float:
    """Return four steps: sums within each region, two halves of sums between the regions, and back to all nodes.

    The smallest region has L nodes, and the first L of each are its lanes. Each adds up 1/L of the bytes of its region.
    Then the same lanes of all k regions reduce them directly, 1/k in a message, and each sends the sums to the nodes of
    its region. Messages of a step are on their way at a time.
    """
    regions = defaultdict[str, list[str]](list)
    for node in nodes:
        regions[links.region_of[node]].append(node)
    num_lanes = min(map(len, regions.values()))
    to_lanes = [
        (node, lane) for region in regions.values() for node in region for lane in region[:num_lanes] if node != lane
    ]
    lanes = zip(*regions.values(), strict=False)  # as many as the smallest region has
    between = [(source, sink) for lane in lanes for source in lane for sink in lane if source != sink]
    lane_gbit = gbit / num_lanes
    there_s = links.sent_s(to_lanes, lane_gbit)
    back_s = links.sent_s([(lane, node) for node, lane in to_lanes], lane_gbit)
    return there_s + 2 * links.sent_s(between, lane_gbit / len(regions)) + back_s
