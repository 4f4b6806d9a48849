"""Subsets of a model's parts behind which the hidden state stays nearest to that of the whole model.

A dynamic programme over the parts in order (CLaSp, arXiv 2505.24196; KnapSpec, arXiv 2602.20217: parts weighed by what
they cost). A cell holds the subsets of one cost with the highest cosine so far; what is right behind a part depends on
the subset before it, so more than one is kept in each.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from skippipe.inference.decoder import Decoder
from skippipe.inference.policies.best.part_costs import Part, Subset, cost_of

LEVELS = 64
"""Costs that are told apart, at most."""


@dataclass(frozen=True)
class _PartialSubset:
    subset: Subset
    cost: float
    hidden: Tensor
    """Behind the parts so far, (B, T, D)."""
    cosine: float = 1.0


@torch.inference_mode()
def nearest_subsets(
    decoder: Decoder, input_ids: Tensor, parts: Sequence[Part], budget: float, *, width: int
) -> list[Subset]:
    """Return subsets that cost at most `budget`, the nearest first.

    Args:
        decoder: The model.
        input_ids: The text, (B, T).
        parts: All parts, in the order in which they run.
        budget: The most that a subset may cost.
        width: How many subsets of one cost are followed.
    """
    whole = decoder.embed(input_ids)  # (B, T, D)
    states = [_PartialSubset((), 0.0, whole)]
    rest = cost_of(parts, range(len(parts)))
    least = budget - max(part.cost for part in parts)
    level = max(rest / LEVELS, min(part.cost for part in parts) / 2)
    for number, part in enumerate(parts):
        rest -= part.cost
        whole = decoder.run_layers(whole, part.layers)
        ran = decoder.run_layers(torch.cat([state.hidden for state in states]), part.layers).chunk(len(states))
        grown = [] if part.always else list(states)
        for state, hidden in zip(states, ran, strict=True):
            grown.append(_PartialSubset((*state.subset, number), state.cost + part.cost, hidden))
        cells: dict[int, list[_PartialSubset]] = defaultdict(list)
        for state in grown:
            if state.cost <= budget * (1 + 1e-9) and state.cost + rest > least:
                nearness = float(functional.cosine_similarity(state.hidden.float(), whole.float(), dim=-1).mean())
                cells[round(state.cost / level)].append(
                    _PartialSubset(state.subset, state.cost, state.hidden, nearness)
                )
        states = [state for cell in cells.values() for state in sorted(cell, key=_distance)[:width]]
    return [state.subset for state in sorted(states, key=_distance)]


def _distance(state: _PartialSubset) -> float:
    return -state.cosine
