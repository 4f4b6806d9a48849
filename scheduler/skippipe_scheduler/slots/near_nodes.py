"""Which stages have room among near nodes, when the placement is free: what their gradient reductions take at least.

A reduction connects all replicas of its stage by edges, each a pair of nodes that send gradients to each other. It
takes no less than the slowest edge. So stages that reduce within t seconds lie each within nodes that edges of at most
t connect, and those only have room for so many stages.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
from networkx.utils import UnionFind

from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.slots.slot_model import SlotModel


def edges_s(slot_model: SlotModel, size: int, gbit: float) -> npt.NDArray[np.float64]:
    """Return what a reduction of `gbit` over `size` nodes takes at least if two of them are an edge of it, (N, N).

    As in `problem.gradient_reduction`, where shared cards and uplinks only add to it: in a ring an edge has 2 (R - 1)
    messages of 1/R of the bytes, one way (with two nodes both). In a tree it has two of all bytes, one each way. In the
    other two it has two of at least 1/R, one each way; where direct, both ways in each half.
    """
    kind = slot_model.problem.reduction
    part_gbit = gbit if kind == "tree" else gbit / size
    bandwidth = slot_model.gbit_per_s + np.diag(np.full(len(slot_model.gbit_per_s), np.inf))
    message_s = slot_model.latency_s + part_gbit / bandwidth  # (N, N)
    if kind in ("tree", "hierarchical"):
        return message_s + message_s.T
    if kind == "ring" and size > 2:
        return 2 * (size - 1) * np.minimum(message_s, message_s.T)
    return 2 * np.maximum(message_s, message_s.T)


def growing_room(edge_s: npt.NDArray[np.float64], sizes: Sequence[int]) -> Iterator[tuple[float, int]]:
    """Yield t and for how many stages of these sizes nodes that edges of at most t connect may have room, t growing.

    A group of connected nodes has room for as many as the smallest of them that fill it.
    """
    filled = [*accumulate(sorted(sizes))]
    groups, members = UnionFind(range(len(edge_s))), [1] * len(edge_s)
    room = len(members) * bisect_right(filled, 1)
    yield 0.0, room
    for joined_s, *ends in _closest_first(edge_s):
        parts = [members[groups[end]] for end in ends]
        groups.union(*ends)
        members[groups[ends[0]]] = sum(parts)
        room += bisect_right(filled, sum(parts)) - sum(bisect_right(filled, part) for part in parts)
        yield joined_s, room


def room_within_s(edge_s: npt.NDArray[np.float64], sizes: Sequence[int]) -> float:
    """Return the least t for which they may have room for all."""
    return next(within_s for within_s, room in growing_room(edge_s, sizes) if room >= len(sizes))


def _closest_first(edge_s: npt.NDArray[np.float64]) -> list[tuple[float, int, int]]:
    """Return the edges of a minimum spanning tree of the complete graph, the smallest first (Prim's method)."""
    tree: list[tuple[float, int, int]] = []
    outside = np.ones(len(edge_s), dtype=bool)
    outside[0] = False
    nearest_s, nearest = edge_s[0].copy(), np.zeros(len(edge_s), dtype=int)  # (N,): to the tree, from which node of it
    while outside.any():
        node = int(np.where(outside, nearest_s, np.inf).argmin())
        tree.append((float(nearest_s[node]), int(nearest[node]), node))
        outside[node] = False
        nearer = edge_s[node] < nearest_s
        nearest_s[nearer], nearest[nearer] = edge_s[node][nearer], node
    return sorted(tree)


def reduced_gbit(problem: Problem) -> list[tuple[int, float]]:
    """Return how many replicas of each stage reduce how many Gbit; a single one has nothing to reduce."""
    sizes = zip(problem.sizes, problem.stage_gbit, strict=True)
    return [(size, gbit if size > 1 else 0.0) for size, gbit in sizes]


def least_anywhere_s(slot_model: SlotModel) -> tuple[float, ...]:
    """Return what the reduction of each stage takes at least, wherever its replicas are."""
    problem = slot_model.problem
    if problem.reduction_links() is None:
        return problem.costs.reduce_s or (0.0,) * problem.num_stages
    reduced = reduced_gbit(problem)
    least_s = {(size, gbit): room_within_s(edges_s(slot_model, size, gbit), [size]) for size, gbit in {*reduced}}
    return tuple(least_s[size, gbit] for size, gbit in reduced)
