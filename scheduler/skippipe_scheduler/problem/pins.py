"""Nodes that must hold a given stage, while the placement of the others is free."""

from collections import Counter
from collections.abc import Mapping, Sequence

from skippipe_scheduler.errors import nearest


def check_pins(pinned: Mapping[str, int], nodes: Sequence[str], sizes: Sequence[int]) -> None:
    """Raise `ValueError` naming the first pin that `nodes` and stages of these sizes have no place for."""
    for node, stage in pinned.items():
        if node not in nodes:
            raise ValueError(f"pinned: unknown node {node!r}; {nearest(node, [*nodes])}")
        if not 0 <= stage < len(sizes):
            raise ValueError(f"pinned: node {node!r} is at stage {stage}; stages are 0 to {len(sizes) - 1}")
    for stage, count in sorted(Counter(pinned.values()).items()):
        if count > sizes[stage]:
            raise ValueError(
                f"pinned: {count} nodes are at stage {stage}, stage_sizes has room for {sizes[stage]}; "
                "pin fewer nodes there or give other stage_sizes"
            )


def pins_within(pinned: Mapping[str, int], sizes: Sequence[int]) -> dict[str, int]:
    """Return the pins that stages of these sizes have room for: the first ones of each stage."""
    room = list(sizes)
    kept: dict[str, int] = {}
    for node, stage in pinned.items():
        if room[stage]:
            kept[node] = stage
            room[stage] -= 1
    return kept


def open_stages(pinned: Mapping[str, int], sizes: Sequence[int]) -> set[int]:
    """Return the stages that a free node may get: those with room beside their pinned nodes."""
    taken = Counter(pinned.values())
    return {stage for stage, size in enumerate(sizes) if taken[stage] < size}
