"""Placements by groups of near nodes: each group holds its share of every stage, so that routes can stay within one.

With as many groups as there are replicas each group is a pipeline of its own; with one group each stage lies in one
place, so that its gradients are reduced over good links. Between the two lies what suits a cluster.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from skippipe_scheduler.slots.placement import dealt_stages, with_pins
from skippipe_scheduler.slots.replica_order import order_replicas
from skippipe_scheduler.slots.slot_model import SlotModel, SlotPlacement

_DIVISORS = (1, 2, 3, 5, 8)
"""As many groups as there are replicas or regions, or one for so many of them, are tried. Chosen."""
_SNAP = 0.25
"""Share of a group by which its end moves to the end of a region. Chosen."""
_STARTS = 12
"""Regions at which a tour begins, of which the shortest counts. Chosen."""


def grouped_placements(slot_model: SlotModel) -> Iterator[SlotPlacement]:
    """Yield placements by fewer and fewer groups, the last by one, each with its replicas in a good order."""
    regions = _regions(slot_model)
    tour = _tour(_seconds_between(slot_model, regions))
    ranks = [rank for region in tour for rank in _early_first(slot_model, regions[region])]
    ends = np.cumsum([len(regions[region]) for region in tour])
    for groups in _group_counts(len(regions), min(slot_model.problem.sizes)):
        yield order_replicas(slot_model, with_pins(slot_model, _grouped(slot_model, ranks, _cuts(ends, groups))))


def _group_counts(regions: int, replicas: int) -> list[int]:
    counts = {max(1, count // divisor) for count in (regions, replicas) for divisor in _DIVISORS}
    return sorted((count for count in counts if count <= replicas), reverse=True)


def _regions(slot_model: SlotModel) -> list[list[int]]:
    """Return the nodes of each region; a node is one of its own where the problem names no regions."""
    problem = slot_model.problem
    found: dict[str, list[int]] = {}
    for rank, region in enumerate(problem.regions or problem.nodes):
        found.setdefault(region, []).append(rank)
    return list(found.values())


def _early_first(slot_model: SlotModel, ranks: list[int]) -> list[int]:
    """Return nodes with much memory, and fast ones, first: early stages hold microbatches longest."""
    costs, names = slot_model.problem.costs, slot_model.problem.nodes
    return sorted(ranks, key=lambda rank: (-costs.memory[names[rank]], costs.backward_s[names[rank]], rank))


def _seconds_between(slot_model: SlotModel, regions: list[list[int]]) -> npt.NDArray[np.float64]:
    """Return the mean seconds of a transfer there and back between two regions."""
    transfer_s, names = slot_model.problem.costs.transfer_s, slot_model.problem.nodes
    seconds = np.zeros((len(regions), len(regions)))
    for a, here in enumerate(regions):
        for b, there in enumerate(regions[:a]):
            one_way_s = [transfer_s[names[x]][names[y]] + transfer_s[names[y]][names[x]] for x in here for y in there]
            seconds[a, b] = seconds[b, a] = sum(one_way_s) / len(one_way_s)
    return seconds


def _tour(seconds: npt.NDArray[np.float64]) -> list[int]:
    """Return a short closed tour: the nearest next, from several starts, then pieces turned round (2-opt)."""
    count = len(seconds)
    tours = [_nearest_next(seconds, start) for start in range(min(count, _STARTS))]
    tour = min(tours, key=lambda found: sum(seconds[found[i - 1], found[i]] for i in range(count)))
    shorter = True
    while shorter:
        shorter = False
        for first in range(count - 2):
            for last in range(first + 1, count - (first == 0)):
                before, after = tour[first - 1], tour[(last + 1) % count]
                old_s = seconds[before, tour[first]] + seconds[tour[last], after]
                if seconds[before, tour[last]] + seconds[tour[first], after] < old_s - 1e-12:
                    tour[first : last + 1] = tour[first : last + 1][::-1]
                    shorter = True
    return tour


def _nearest_next(seconds: npt.NDArray[np.float64], start: int) -> list[int]:
    tour, left = [start], set(range(len(seconds))) - {start}
    while left:
        tour.append(min(left, key=lambda region: (seconds[tour[-1], region], region)))
        left.remove(tour[-1])
    return tour


def _cuts(region_ends: npt.NDArray[np.int64], groups: int) -> list[int]:
    """Return where each of equal groups ends, moved to the end of a region where one is near."""
    size = region_ends[-1] / groups
    cuts = []
    for group in range(1, groups + 1):
        end = int(region_ends[np.abs(region_ends - group * size).argmin()])
        cuts.append(end if abs(end - group * size) <= _SNAP * size else round(group * size))
    return cuts


def _grouped(slot_model: SlotModel, ranks: list[int], cuts: list[int]) -> SlotPlacement:
    """Return the placement in which each group holds, along its nodes, its share of the stages in ascending order."""
    held: list[list[int]] = [[] for _ in slot_model.problem.sizes]
    dealt, begin = dealt_stages(slot_model), 0
    for end in cuts:
        for stage, rank in zip(sorted(dealt[begin:end]), ranks[begin:end], strict=True):
            held[stage].append(rank)
        begin = end
    return tuple(rank for replicas in held for rank in replicas)
