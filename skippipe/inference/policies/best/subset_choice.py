"""The best of some subsets by a score that runs the model, bettered by swapping parts."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import LayerSelection, Segment
from skippipe.inference.policies.best.part_costs import Part, Subset, cost_of, selection_of

SelectionScore = Callable[[LayerSelection], float]
"""How bad a selection of layers is."""


def loss_score(decoder: Decoder, tokens: Tensor) -> SelectionScore:
    """Return the score that is the loss on a text, (B, T + 1): the logarithm of the perplexity."""
    input_ids, labels = tokens[:, :-1], tokens[:, 1:]

    @torch.inference_mode()
    def loss(layers: LayerSelection) -> float:
        return float(decoder.loss(input_ids, labels, [Segment(layers, input_ids.shape[1])]))

    return loss


def cosine_score(decoder: Decoder, tokens: Tensor) -> SelectionScore:
    """Return the score that is 1 less the mean cosine of the hidden state behind all layers to the whole model's."""
    with torch.inference_mode():
        embedded = decoder.embed(tokens[:, :-1])  # (B, T, D)
        whole = decoder.run_layers(embedded, decoder.all_layers).float()

    @torch.inference_mode()
    def distance(layers: LayerSelection) -> float:
        hidden = decoder.run_layers(embedded, layers).float()
        return 1 - float(functional.cosine_similarity(hidden, whole, dim=-1).mean())

    return distance


def damages(parts: Sequence[Part], score: SelectionScore) -> list[float]:
    """Return the score without each part alone; infinite for parts that always run."""
    numbers = range(len(parts))
    return [
        math.inf if parts[gone].always else score(selection_of(parts, (number for number in numbers if number != gone)))
        for gone in numbers
    ]


def one_by_one(parts: Sequence[Part], budget: float, damage: Sequence[float]) -> Subset:
    """Return what is left within the budget where the parts of the least damage are left out, cost for cost."""
    whole = min(damage)
    order = sorted(range(len(parts)), key=lambda number: (damage[number] - whole) / parts[number].cost)
    cost, gone = cost_of(parts, order), set()
    for number in order:
        if cost <= budget * (1 + 1e-9):
            break
        gone.add(number)
        cost -= parts[number].cost
    return tuple(number for number in range(len(parts)) if number not in gone)


def choose(
    candidates: Sequence[Subset],
    parts: Sequence[Part],
    budget: float,
    score: SelectionScore,
    *,
    damage: Sequence[float],
    tries: int,
) -> Subset:
    """Return the candidate with the lowest score, after at most `tries` swaps of which each better one is kept.

    What does much `damage` where it is left out alone comes back first, and what does little goes first.
    """
    scores = {subset: score(selection_of(parts, subset)) for subset in dict.fromkeys(candidates)}
    best = min(scores, key=scores.__getitem__)
    moves = _swaps(best, parts, budget, damage)
    for _ in range(tries):
        subset = next((subset for subset in moves if subset not in scores), None)
        if subset is None:
            break
        scores[subset] = score(selection_of(parts, subset))
        if scores[subset] < scores[best]:
            best = subset
            moves = _swaps(best, parts, budget, damage)
    return best


def _swaps(subset: Subset, parts: Sequence[Part], budget: float, damage: Sequence[float]) -> Iterator[Subset]:
    """Yield the subset with one part in place of another, the most promising first, within the budget."""
    others = [number for number in range(len(parts)) if number not in subset]
    may_go = [number for number in subset if not parts[number].always]
    pairs = itertools.product(others, may_go)
    for comes, goes in sorted(pairs, key=lambda pair: damage[pair[1]] - damage[pair[0]]):
        swapped = tuple(sorted({*subset, comes} - {goes}))
        if cost_of(parts, swapped) <= budget * (1 + 1e-9):
            yield swapped
