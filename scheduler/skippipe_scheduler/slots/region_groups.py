"""Placements by groups of near nodes: each group holds its share of every stage, so that routes can stay within one.

With as many groups as there are replicas each group is a pipeline of its own; with one group each stage lies in one
place, so that its gradients are reduced over good links. Between the two lies what suits a cluster.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from statistics import fmean
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.problem.stage_sizes import StageSizes, even_sizes, whole_shares
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
    """Yield placements by fewer and fewer groups, the last by one, each with its replicas in a good order.

    Where stages can lie in one region each, the one group also follows the most promising of the tours that allow it.
    """
    problem = slot_model.problem
    regions = _regions(problem)
    seconds, means = _seconds_between(problem, regions), [_region_means(problem, ranks) for ranks in regions]
    tour = _tour(seconds)

    def placement(tour: Sequence[int], groups: int) -> SlotPlacement:
        ranks = [rank for region in tour for rank in _early_first(slot_model, regions[region])]
        ends = np.cumsum([len(regions[region]) for region in tour])
        return order_replicas(slot_model, with_pins(slot_model, _grouped(slot_model, ranks, _cuts(ends, groups))))

    def taken_s(tour: Sequence[int]) -> float:
        return _microbatch_s(_line(problem.sizes, tour, regions), means, seconds)

    for groups in _group_counts(len(regions), min(problem.sizes)):
        yield placement(tour, groups)
    whole = [turned for turned in _turns(tour) if _divides_no_stage(problem.sizes, turned, regions)]
    if whole:
        yield placement(min(whole, key=taken_s), 1)


def sizes_by_region(problem: Problem, most: int) -> list[StageSizes]:
    """Return up to `most` choices of sizes with which each stage lies in one region, the most promising first.

    Then no gradients are reduced between regions. Stages follow the tour of the regions, from any of them on and either
    way round; a region has stages in proportion to the work that its nodes can do, and divides its nodes evenly over
    them. There is none where all nodes are in one region, or regions are more than stages.
    """
    regions = _regions(problem)
    if not 1 < len(regions) <= problem.num_stages:
        return []
    means = [_region_means(problem, ranks) for ranks in regions]
    speeds = [len(ranks) / mean.work_s for ranks, mean in zip(regions, means, strict=True)]
    counts = whole_shares([speed / sum(speeds) for speed in speeds], problem.num_stages)
    if any(count > len(ranks) for count, ranks in zip(counts, regions, strict=True)):
        return []
    seconds, found = _seconds_between(problem, regions), dict[StageSizes, float]()
    for tour in _turns(_tour(seconds)):
        sizes = tuple(size for region in tour for size in even_sizes(len(regions[region]), counts[region]))
        taken_s = _microbatch_s(_line(sizes, tour, regions), means, seconds)
        found[sizes] = min(found.get(sizes, taken_s), taken_s)
    return sorted(found, key=found.__getitem__)[:most]


class _RegionMeans(NamedTuple):
    """Means over the nodes of a region."""

    work_s: float
    """Of a forward and its backward."""
    loss_s: float
    memory: float
    """Microbatches that a node holds."""
    near_s: float
    """Of a transfer there and back between two nodes of the region."""


def _region_means(problem: Problem, ranks: Sequence[int]) -> _RegionMeans:
    costs, names = problem.costs, [problem.nodes[rank] for rank in ranks]
    near_s = [costs.transfer_s[a][b] + costs.transfer_s[b][a] for a, b in pairwise(names)]
    return _RegionMeans(
        fmean(costs.forward_s[name] + costs.backward_s[name] for name in names),
        fmean(costs.loss_s.get(name, 0.0) for name in names),
        fmean(costs.memory[name] for name in names),
        fmean(near_s) if near_s else 0.0,
    )


def _microbatch_s(
    line: Sequence[tuple[int, int]], means: Sequence[_RegionMeans], seconds: npt.NDArray[np.float64]
) -> float:
    """Return about how many seconds of an iteration each microbatch takes: by memory or by work, of the slowest stage.

    A stage holds a microbatch from its forward to its backward. Where it holds M at a time, each for h seconds, one
    ends every h / M seconds (Little's law). `line` has the region and the size of each stage.
    """
    first, last = line[0][0], line[-1][0]
    held_s, slowest_s, after = seconds[last, first] + means[first].loss_s, 0.0, last
    for region, size in reversed(line):
        mean = means[region]
        held_s += mean.work_s + (mean.near_s if region == after else seconds[region, after])
        slowest_s = max(slowest_s, held_s / (size * mean.memory), mean.work_s / size)
        after = region
    return float(slowest_s)


def _turns(tour: list[int]) -> list[list[int]]:
    """Return a closed tour from any of its regions on, as it is and the other way round."""
    turned = [tour[start:] + tour[:start] for start in range(len(tour))]
    return [*turned, *(other[::-1] for other in turned)]


def _line(sizes: StageSizes, tour: Sequence[int], regions: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Return the region of the first node of each stage, and the stage's size, where stages follow the tour."""
    of_nodes = [region for region in tour for _ in regions[region]]
    firsts = accumulate(sizes[:-1], initial=0)
    return [(of_nodes[first], size) for first, size in zip(firsts, sizes, strict=True)]


def _divides_no_stage(sizes: StageSizes, tour: Sequence[int], regions: Sequence[Sequence[int]]) -> bool:
    """Return whether each stage lies in one region, where stages follow the tour."""
    return {*accumulate(len(regions[region]) for region in tour)} <= {*accumulate(sizes)}


def _group_counts(regions: int, replicas: int) -> list[int]:
    counts = {max(1, count // divisor) for count in (regions, replicas) for divisor in _DIVISORS}
    return sorted((count for count in counts if count <= replicas), reverse=True)


def _regions(problem: Problem) -> list[list[int]]:
    """Return the nodes of each region; a node is one of its own where the problem names no regions."""
    found: dict[str, list[int]] = {}
    for rank, region in enumerate(problem.regions or problem.nodes):
        found.setdefault(region, []).append(rank)
    return list(found.values())


def _early_first(slot_model: SlotModel, ranks: list[int]) -> list[int]:
    """Return nodes with much memory, and fast ones, first: early stages hold microbatches longest."""
    costs, names = slot_model.problem.costs, slot_model.problem.nodes
    return sorted(ranks, key=lambda rank: (-costs.memory[names[rank]], costs.backward_s[names[rank]], rank))


def _seconds_between(problem: Problem, regions: list[list[int]]) -> npt.NDArray[np.float64]:
    """Return the mean seconds of a transfer there and back between two regions."""
    transfer_s, names = problem.costs.transfer_s, problem.nodes
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
