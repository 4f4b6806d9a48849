"""A sample of the legal sequences, where they are too many to list."""

import random
from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from skippipe_scheduler.problem.rules import Rules

SAMPLED_SEQUENCES = 300
"""Sequences of each length that are drawn where there are too many to list. Chosen."""


def sample_sequences(rules: Rules, count: int = SAMPLED_SEQUENCES) -> tuple[tuple[int, ...], ...]:
    """Return up to `count` legal sequences without swaps of every length; together they visit all stages about equally.

    For rules that allow too many sequences to list. The draws are always the same.
    """
    generator = random.Random(0)
    found: dict[tuple[int, ...], None] = {}
    for length in rules.lengths:
        visits = [0.0] * rules.num_stages
        for _ in range(count):
            weights = [visit + generator.random() for visit in visits]
            for stage in rules.protected_stages:
                weights[stage] -= 2 * sum(visits) + rules.num_stages  # so that no other stages make up for it
            sequence = _least_visited(rules, length, weights)
            if sequence is None or not set(rules.protected_stages) <= {*sequence}:
                break
            found[sequence] = None
            for stage in sequence:
                visits[stage] += 1
    return tuple(sorted(found))


def _least_visited(rules: Rules, length: int, weights: Sequence[float]) -> tuple[int, ...] | None:
    """Return the ascending legal sequence of least total weight, by dynamic programming over its last stage."""
    stages, jump = rules.num_stages, min(rules.max_forward_jump, rules.num_stages - 1)
    weight_of, every = np.array(weights), np.arange(stages)
    padded = np.full(jump + stages, np.inf)  # least weights by last stage, behind a margin to jump from
    padded[jump] = 0.0
    reaching = sliding_window_view(padded, jump)[:stages]  # (stages, jump): of the stages before each
    came_from = []
    for _ in range(length - 1):
        choice = reaching.argmin(axis=1)
        came_from.append(every - jump + choice)
        padded[jump:] = reaching[every, choice] + weight_of
    last = int(padded[jump:].argmin())
    if not np.isfinite(padded[jump + last]):
        return None
    sequence = [last]
    for before in reversed(came_from):
        sequence.append(int(before[sequence[-1]]))
    return tuple(reversed(sequence))
