"""What a model does with stages left out: its loss over every choice of as many stages."""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from skippipe.model.stage import Stage

Batch = tuple[Tensor, Tensor]


def perplexities(
    stages: Mapping[int, Stage], batches: Sequence[Batch], depths: Sequence[int]
) -> dict[int, dict[str, float]]:
    """Return perplexities by number of layers: over all choices of stages (`mean`), and for the `best` choice.

    Stage 0 always runs, the others in order. `mean` is the exponential of the mean loss over the choices, which is what
    stages drawn at random have on the long run.
    """
    found = {}
    for kept in depths:
        choices = [(0, *others) for others in combinations(range(1, len(stages)), kept - 1)]
        losses = [_loss([stages[index] for index in choice], batches) for choice in choices]
        layers = kept * (stages[0].last - stages[0].first)
        found[layers] = {"mean": math.exp(statistics.fmean(losses)), "best": math.exp(min(losses))}
    return found


@torch.no_grad()
def _loss(stages: Sequence[Stage], batches: Sequence[Batch]) -> float:
    losses = []
    for stage in stages:
        stage.eval()
    for input_ids, labels in batches:
        hidden = stages[0].embed(input_ids)  # (B, T, D)
        for stage in stages:
            hidden = stage(hidden)
        losses.append(float(stages[0].loss(hidden, labels)))
    return statistics.fmean(losses)
