"""Placements to begin from, before any search."""

import random
from collections.abc import Iterable

from skippipe_scheduler.slots import Layout, Placement


def regional_placement(layout: Layout) -> Placement:
    """Return a placement that gives every region its share of every stage, so that routes can stay near.

    Region by region, each node takes the stage that is furthest behind its share.
    """
    problem = layout.problem
    regions = problem.regions or problem.nodes
    by_region = sorted(range(len(problem.nodes)), key=lambda rank: (regions.index(regions[rank]), rank))
    return _deal(layout, by_region)


def random_placement(layout: Layout, seed: int) -> Placement:
    """Return a uniformly random placement."""
    nodes = list(range(len(layout.problem.nodes)))
    random.Random(seed).shuffle(nodes)
    return tuple(nodes)


def _deal(layout: Layout, nodes: Iterable[int]) -> Placement:
    sizes = layout.problem.sizes
    whole = sum(sizes)
    given: list[list[int]] = [[] for _ in sizes]
    for dealt, node in enumerate(nodes, start=1):
        open_stages = [stage for stage, size in enumerate(sizes) if len(given[stage]) < size]
        behind = max(open_stages, key=lambda stage: sizes[stage] * dealt / whole - len(given[stage]))
        given[behind].append(node)
    return tuple(node for replicas in given for node in replicas)
