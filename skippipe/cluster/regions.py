"""Which nodes are near each other: regions are groups of nodes with short latencies between them."""

from collections.abc import Mapping, Sequence

import networkx as nx

NEAR_S = 0.002
"""One way. Hosts of one site or one cloud region are nearer than this, different regions are not."""


def regions(
    given: Sequence[str | None], latency_s: Mapping[tuple[int, int], float], near_s: float = NEAR_S
) -> list[str]:
    """Return the region of every rank: the one given, else that of a near rank, else region-0, region-1, ...

    Ranks are near each other where a chain of latencies below `near_s` leads from one to the other.
    """
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(len(given)))
    graph.add_edges_from(pair for pair, seconds in latency_s.items() if seconds < near_s)
    groups = sorted(nx.connected_components(graph), key=min)
    found = [""] * len(given)
    for index, group in enumerate(groups):
        known = [name for rank in sorted(group) if (name := given[rank]) is not None]
        for rank in group:
            found[rank] = given[rank] or (known[0] if known else f"region-{index}")
    return found
