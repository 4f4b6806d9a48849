"""Routes to choose from: every legal one where they are few, else cheap and some random ones by origin and sequence."""

import itertools
import random
from dataclasses import dataclass
from math import prod

from skippipe_scheduler.slots.slot_model import SlotCosts, SlotModel, SlotRoute

MOST_ROUTES = 2500
"""Routes to choose from. Chosen: an integer program with more is slower to presolve than they are worth."""
MOST_SEQUENCES = 60
"""Stage sequences that are considered where not all routes are. Chosen."""
LEAST_PER_PAIR = 2
"""Routes of each origin along each of them at least. Chosen."""
RANDOM_SHARE = 3
"""One in so many of them is drawn at random, because the cheapest often share their slots. Chosen."""
COMPARED = 400
"""Sequences among which the one that visits the least visited stages is taken next. Chosen."""


@dataclass(frozen=True)
class Candidates:
    """Routes to choose from; `complete` when these are all legal ones."""

    routes: tuple[SlotRoute, ...]
    complete: bool


def count_routes(slot_model: SlotModel) -> int:
    """Return the number of routes along the sequences of `slot_model`."""
    return sum(prod(len(slot_model.slots_of[stage]) for stage in sequence) for sequence in slot_model.sequences)


def list_routes(costs: SlotCosts, seed: int, limit: int = MOST_ROUTES) -> Candidates:
    """Return every legal route if there are at most `limit`, else cheap and random ones."""
    slot_model = costs.slot_model
    if slot_model.lists_all_sequences and count_routes(slot_model) <= limit:
        every = itertools.chain.from_iterable(
            itertools.product(*(slot_model.slots_of[s] for s in sequence)) for sequence in slot_model.sequences
        )
        return Candidates(tuple(every), complete=True)
    rng = random.Random(seed)
    sequences = list(slot_model.sequences)
    if len(sequences) > MOST_SEQUENCES:
        sequences = spread_sequences(slot_model, rng, MOST_SEQUENCES)
    origins = slot_model.slots_of[0]
    per_pair = max(LEAST_PER_PAIR, limit // (len(origins) * len(sequences)))
    found: dict[SlotRoute, None] = {}
    for origin in origins:
        for sequence in sequences:
            for route in _cheapest(costs, origin, sequence, per_pair - per_pair // RANDOM_SHARE):
                found[route] = None
            for _ in range(per_pair // RANDOM_SHARE):
                found[origin, *(rng.choice(slot_model.slots_of[stage]) for stage in sequence[1:])] = None
    return Candidates(tuple(found), complete=False)


def spread_sequences(slot_model: SlotModel, rng: random.Random, count: int) -> list[tuple[int, ...]]:
    """Return up to `count` legal sequences that visit the stages about equally often."""
    visits = [0] * slot_model.problem.num_stages
    rest = list(slot_model.sequences)
    rng.shuffle(rest)
    chosen: list[tuple[int, ...]] = []
    while rest and len(chosen) < count:
        best = min(rest[:COMPARED], key=lambda sequence: sum(visits[stage] for stage in sequence))
        rest.remove(best)
        chosen.append(best)
        for stage in best:
            visits[stage] += 1
    return chosen


def _cheapest(costs: SlotCosts, origin: int, sequence: tuple[int, ...], count: int) -> list[SlotRoute]:
    """Return about the `count` cheapest routes along `sequence` (beam search that keeps every last slot)."""
    partial: list[tuple[float, SlotRoute]] = [(0.0, (origin,))]
    slots_of = costs.slot_model.slots_of
    for stage in sequence[1:]:
        longer: list[tuple[float, SlotRoute]] = []
        for slot in slots_of[stage]:
            work_s = costs.forward_s[slot] + costs.backward_s[slot]
            reached = sorted(
                (length_s + costs.both_ways_s(route[-1], slot) + work_s, (*route, slot)) for length_s, route in partial
            )
            longer += reached[: max(1, count // len(slots_of[stage]) + 1)]
        partial = longer
    closed = sorted((length_s + costs.both_ways_s(route[-1], origin), route) for length_s, route in partial)
    return [route for _, route in closed[:count]]
