"""The least time of a gradient reduction over all orders of a stage's replicas: the planner chooses among them."""

from collections.abc import Sequence

from skippipe_scheduler.problem.gradient_reduction import BY_ORDER, LinkSpeeds, Reduction, reduction_s
from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.slots.replica_order import all_orders


def least_reductions_s(problem: Problem, stages: tuple[tuple[str, ...], ...]) -> tuple[float, ...]:
    """Return what the reduction of each stage takes at least, whatever the order of the nodes that hold it."""
    links = problem.reduction_links()
    if links is None or problem.reduction not in BY_ORDER:
        return problem.reduce_s(stages)
    return tuple(
        _least_s(problem.reduction, links, nodes, gbit) for nodes, gbit in zip(stages, problem.stage_gbit, strict=True)
    )


def _least_s(kind: Reduction, links: LinkSpeeds, nodes: Sequence[str], gbit: float) -> float:
    if len(nodes) == 1:
        return 0.0
    orders = all_orders(kind, nodes)
    if orders:
        return min(reduction_s(kind, links, order, gbit) for order in orders)
    return _ring_s(links, nodes, gbit) if kind == "ring" else _tree_s(links, nodes, gbit)


def _ring_s(links: LinkSpeeds, nodes: Sequence[str], gbit: float) -> float:
    """Return the steps of a ring in which every node has its nearest before and behind it."""
    sent_s, received_s = _nearest_s(links, nodes, gbit / len(nodes))
    return 2 * (len(nodes) - 1) * max(*sent_s, *received_s)


def _tree_s(links: LinkSpeeds, nodes: Sequence[str], gbit: float) -> float:
    """Return the rounds of a tree in which every node but the root has its nearest as its parent.

    Of rounds in descending order of their slowest edge, the first k have at most the edges of the k largest, so that
    the next has one that is no faster than all edges behind those. The slowest node is the root, who sends nothing.
    """
    largest_first = [len(range(1 << step, len(nodes), 2 << step)) for step in range((len(nodes) - 1).bit_length())]
    total_s = 0.0
    for edges_s in _nearest_s(links, nodes, gbit):
        slowest_first, done = sorted(edges_s, reverse=True)[1:], 0
        for edges in largest_first:
            total_s += slowest_first[done]
            done += edges
    return total_s


def _nearest_s(links: LinkSpeeds, nodes: Sequence[str], gbit: float) -> tuple[list[float], list[float]]:
    """Return how long each node's message to, and then from, the nearest other takes; sharing only delays it."""
    others = {node: [other for other in nodes if other != node] for node in nodes}
    sent_s = [min(links.message_s(node, other, gbit) for other in others[node]) for node in nodes]
    received_s = [min(links.message_s(other, node, gbit) for other in others[node]) for node in nodes]
    return sent_s, received_s
