"""The best of some subsets by a score that runs the model, bettered by swapping parts."""

import itertools
import random
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


def choose(
    candidates: Sequence[Subset], parts: Sequence[Part], budget: float, score: SelectionScore, *, tries: int, seed: int
) -> Subset:
    """Return the candidate with the lowest score, after at most `tries` swaps of which each better one is kept."""
    scores = {subset: score(selection_of(parts, subset)) for subset in dict.fromkeys(candidates)}
    best = min(scores, key=scores.__getitem__)
    moves = _swaps(best, parts, budget, random.Random(seed))
    for _ in range(tries):
        subset = next((subset for subset in moves if subset not in scores), None)
        if subset is None:
            break
        scores[subset] = score(selection_of(parts, subset))
        if scores[subset] < scores[best]:
            best = subset
            moves = _swaps(best, parts, budget, random.Random(seed))
    return best


def _swaps(subset: Subset, parts: Sequence[Part], budget: float, generator: random.Random) -> Iterator[Subset]:
    """Yield the subset with one part in place of another, near ones first, within the budget."""
    others = [number for number in range(len(parts)) if number not in subset]
    may_go = [number for number in subset if not parts[number].always]
    pairs = list(itertools.product(others, may_go))
    generator.shuffle(pairs)
    pairs.sort(key=lambda pair: abs(pair[0] - pair[1]) > 2)
    for comes, goes in pairs:
        swapped = tuple(sorted({*subset, comes} - {goes}))
        if cost_of(parts, swapped) <= budget * (1 + 1e-9):
            yield swapped
