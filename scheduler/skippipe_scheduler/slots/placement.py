"""Placements to begin from, before any search."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations, groupby, islice

from skippipe_scheduler.slots.slot_model import SlotModel, SlotPlacement


def regional_placement(slot_model: SlotModel) -> SlotPlacement:
    """Return a placement that gives every region its share of every stage, so that routes can stay near.

    Within a region, nodes with much memory hold early stages, where microbatches stay longest. Of those with equal
    memory the fastest are origins, and the other stages get fast and slow ones alike.
    """
    problem, costs = slot_model.problem, slot_model.problem.costs
    names = problem.nodes
    regions = problem.regions or ("",) * len(problem.nodes)
    ranks = range(len(problem.nodes))
    by_region = sorted(ranks, key=lambda rank: (regions.index(regions[rank]), rank))
    held: list[list[int]] = [[] for _ in problem.sizes]
    dealt = list(zip(by_region, dealt_stages(slot_model), strict=True))
    for region in dict.fromkeys(regions):
        stages = sorted(stage for rank, stage in dealt if regions[rank] == region)
        nodes = [rank for rank in by_region if regions[rank] == region]
        nodes.sort(key=lambda rank: (-costs.memory[names[rank]], costs.backward_s[names[rank]], rank))
        begin = 0
        for _, alike in groupby(nodes, key=lambda rank: costs.memory[names[rank]]):
            equal = list(alike)
            for stage, rank in zip(_in_turns(stages[begin : begin + len(equal)]), equal, strict=True):
                held[stage].append(rank)
            begin += len(equal)
    return with_pins(slot_model, tuple(rank for replicas in held for rank in replicas))


def _in_turns(stages: Sequence[int]) -> list[int]:
    """Return the stages in the sequence in which nodes get them, the fastest first: stage 0, then others in turns."""
    given: Counter[int] = Counter()
    turns = []
    for stage in stages:
        turns.append((given[stage] if stage else -1, stage))
        given[stage] += 1
    return [stage for _, stage in sorted(turns)]


def random_placement(slot_model: SlotModel, seed: int) -> SlotPlacement:
    """Return a random placement: a uniform one, in which the pinned nodes are then put where they belong."""
    nodes = list(range(len(slot_model.problem.nodes)))
    random.Random(seed).shuffle(nodes)
    return with_pins(slot_model, tuple(nodes))


def with_pins(slot_model: SlotModel, placement: SlotPlacement) -> SlotPlacement:
    """Return the placement with every pinned node at its stage: it changes places with one that is not pinned there.

    That one is of the same region where there is such a one.
    """
    nodes = list(placement)
    regions = slot_model.problem.regions or ("",) * len(nodes)
    for rank, stage in enumerate(slot_model.pinned):
        here = nodes.index(rank)
        if stage in (-1, slot_model.stage_of[here]):
            continue
        open_slots = [slot for slot in slot_model.slots_of[stage] if slot_model.pinned[nodes[slot]] != stage]
        there = min(open_slots, key=lambda slot: regions[nodes[slot]] != regions[rank])
        nodes[here], nodes[there] = nodes[there], rank
    return tuple(nodes)


def few_placements(slot_model: SlotModel, most: int) -> tuple[SlotPlacement, ...]:
    """Return all placements, replicas of a stage taken as alike, where there are at most `most`; else none."""
    free = tuple(rank for rank, stage in enumerate(slot_model.pinned) if stage < 0)
    found = tuple(islice(_placements(slot_model, free), most + 1))
    return found if len(found) <= most else ()


def _placements(slot_model: SlotModel, free: tuple[int, ...], stage: int = 0) -> Iterator[SlotPlacement]:
    """Yield the placements of `stage` and those after it: pinned nodes, then some of the `free` ones."""
    sizes = slot_model.problem.sizes
    if stage == len(sizes):
        yield ()
        return
    held = tuple(rank for rank, pin in enumerate(slot_model.pinned) if pin == stage)
    for chosen in combinations(free, sizes[stage] - len(held)):
        rest = tuple(rank for rank in free if rank not in chosen)
        for others in _placements(slot_model, rest, stage + 1):
            yield held + chosen + others


def dealt_stages(slot_model: SlotModel) -> list[int]:
    """Return one stage per node in turn: always the one that is furthest behind its share."""
    sizes = slot_model.problem.sizes
    whole = sum(sizes)
    given = [0] * len(sizes)
    dealt = []
    for turn in range(1, whole + 1):
        open_stages = [stage for stage, size in enumerate(sizes) if given[stage] < size]
        dealt.append(max(open_stages, key=lambda stage: sizes[stage] * turn / whole - given[stage]))
        given[dealt[-1]] += 1
    return dealt
