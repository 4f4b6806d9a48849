"""How probable it is that a layer leaves something out, and the draws that decide it.

The form is LayerSkip's (Elhoushi et al., arXiv 2404.16710): p(l, t) = S(t) D(l) p_max, with D rising over the layers
and S constant or rising over the steps. Constant over both it is LayerDrop's (Fan et al., arXiv 1909.11556).
"""

import random

from skippipe.config.recipe_options import DropoutOptions


def rise(position: int, length: int) -> float:
    """Return 2^(i/(n-1)) - 1: 0 at the first of n positions, 1 at the last."""
    return 2.0 ** (position / (length - 1)) - 1.0 if length > 1 else 1.0


def probability(options: DropoutOptions, *, layer: int, num_layers: int, step: int, max_steps: int) -> float:
    """Return how probably a layer leaves its part out at a step; both count from 0."""
    over_depth = 1.0 if options.over_depth == "uniform" else rise(layer, num_layers)
    over_steps = 1.0 if options.over_steps == "constant" else rise(step, max_steps)
    return options.probability * over_depth * over_steps


def kept_samples(
    options: DropoutOptions, probability: float, num_samples: int, key: tuple[object, ...]
) -> tuple[int, ...]:
    """Return the samples of a microbatch that do not leave it out; equal keys draw alike, in any process."""
    if probability == 0:
        return tuple(range(num_samples))
    generator = random.Random("/".join(map(str, key)))
    if options.unit == "microbatch":
        return () if generator.random() < probability else tuple(range(num_samples))
    return tuple(sample for sample in range(num_samples) if generator.random() >= probability)
