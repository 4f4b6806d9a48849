"""The stages that are cheapest to leave out one by one, by what a calibration text says; stage 0 always runs.

`best:influence`: block influence (ShortGPT, Men et al. 2024, arXiv 2403.03853, section 3), here of whole
stages: 1 less the mean cosine of the residual stream before and after a stage. Those with the least are left out.

`best:gradient`: gradient-trace correlation (TraceNAS, arXiv 2602.02891), depth alone. A subset is as good as the
gradients that its layers get resemble those that they get in the whole model. All subsets are compared where there are
few; else every stage is judged by leaving it out alone.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import LayerSelection, Segment
from skippipe.inference.policies.base import FixedLayers, PolicyContext, check_layers_are_here, kept_stages

METHODS = ("influence", "gradient")
MOST_SUBSETS = 32
GRADIENT_SAMPLES = 2

Stages = tuple[int, ...]


def best_stages(context: PolicyContext, method: str) -> FixedLayers:
    """Return the stages with the best score by one of `METHODS`, as many as come nearest to the share."""
    decoder = context.decoder
    present = decoder.present_stages
    kept = min(kept_stages(context.keep, len(decoder.stages)), len(present))
    if kept == len(present):
        stages = present
    elif method == "influence":
        groups = [decoder.stages[stage] for stage in present]
        influence = block_influence(decoder, context.calibration_tokens()[:, :-1], groups)
        stages = _highest(dict(zip(present, influence, strict=True)), kept)
    else:
        check_layers_are_here(decoder, "best:gradient")
        stages = _most_alike(decoder, context.calibration_tokens()[:GRADIENT_SAMPLES], kept)
    return FixedLayers(decoder.layers_of_stages(stages), kept)


@torch.inference_mode()
def block_influence(decoder: Decoder, input_ids: Tensor, groups: Sequence[LayerSelection]) -> list[float]:
    """Return the influence of groups of layers that run one after the other; `input_ids` (B, T)."""
    hidden = decoder.embed(input_ids)  # (B, T, D)
    influence = []
    for layers in groups:
        after = decoder.run_layers(hidden, layers)
        cosine = functional.cosine_similarity(hidden.float(), after.float(), dim=-1)  # (B, T)
        influence.append(1 - float(cosine.mean()))
        hidden = after
    return influence


def gradient_similarity(decoder: Decoder, tokens: Tensor, subsets: Sequence[Stages]) -> list[float]:
    """Return, for each subset, the mean correlation of its layers' gradients with those in the whole model.

    `tokens` (B, T + 1). Only layers count, not embedding and head.
    """
    whole = _gradients(decoder, tokens, decoder.present_stages)
    similarity = []
    for stages in subsets:
        own = _gradients(decoder, tokens, stages)
        similarity.append(sum(_correlation(own[layer], whole[layer]) for layer in own) / len(own))
    return similarity


def _most_alike(decoder: Decoder, tokens: Tensor, kept: int) -> Stages:
    others = decoder.present_stages[1:]
    if math.comb(len(others), kept - 1) <= MOST_SUBSETS:
        subsets = [(0, *chosen) for chosen in itertools.combinations(others, kept - 1)]
        similarity = gradient_similarity(decoder, tokens, subsets)
        return subsets[similarity.index(max(similarity))]
    without = [(0, *(stage for stage in others if stage != gone)) for gone in others]
    loss = [-similarity for similarity in gradient_similarity(decoder, tokens, without)]
    return _highest(dict(zip(others, loss, strict=True)), kept)


def _highest(scores: Mapping[int, float], kept: int) -> Stages:
    """Return stage 0 and the stages with the highest scores, in order."""
    others = sorted(scores.keys() - {0}, key=lambda stage: (-scores[stage], stage))
    return (0, *sorted(others[: kept - 1]))


def _gradients(decoder: Decoder, tokens: Tensor, stages: Stages) -> dict[int, Tensor]:
    """Return the gradient of each layer that runs, flat, from the loss of the model with these stages."""
    layers = decoder.layers_of_stages(stages)
    parameters = {layer: list(decoder.layers[layer].parameters()) for layer in layers}
    with torch.enable_grad():
        loss = decoder.loss(tokens[:, :-1], tokens[:, 1:], [Segment(layers, tokens.shape[1] - 1)])
        wanted = [parameter for group in parameters.values() for parameter in group]
        found = iter(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
    return {layer: torch.cat([next(found).flatten().float() for _ in group]) for layer, group in parameters.items()}


def _correlation(first: Tensor, second: Tensor) -> float:
    return float(functional.cosine_similarity(first - first.mean(), second - second.mean(), dim=0))
