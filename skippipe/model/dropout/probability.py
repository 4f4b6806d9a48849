"""How probable it is that a layer leaves something out, and the draws that decide it.

The form is p(l, t) = S(t) D(l) p_max, over layers l and steps t. LayerSkip (Elhoushi et al., arXiv 2404.16710) has D
exponential and S constant or growing, "Don't Drop Dropout" (arXiv 2609.05275) D linear or alternating and S falling,
LayerDrop (Fan et al., arXiv 1909.11556) both constant.
"""

import random

from skippipe.config.recipe_options import DropoutOptions, RecipeOptions

_SAMPLED_STEPS = 201
"""Steps that stand for a longer training in its mean: probabilities change smoothly, by at most a 200th at a time."""


def over_depth(options: DropoutOptions, layer: int, num_layers: int) -> float:
    """Return D, between 0 and 1, of a layer counted from 0."""
    match options.over_depth:
        case "uniform":
            return 1.0
        case "alternating":
            return float(layer % 2)
        case "linear":
            return _place(layer, num_layers)
        case "exponential":
            return _rise(_place(layer, num_layers))


def over_steps(options: DropoutOptions, step: int, max_steps: int) -> float:
    """Return S, between 0 and 1, of a step counted from 0."""
    match options.over_steps:
        case "constant":
            return 1.0
        case "falling":
            return 1.0 - _place(step, max_steps)
        case "growing":
            return _rise(_place(step, max_steps))


def probability(options: DropoutOptions, *, layer: int, num_layers: int, step: int, max_steps: int) -> float:
    """Return how probably a layer leaves its part out at a step; both count from 0."""
    return options.probability * over_depth(options, layer, num_layers) * over_steps(options, step, max_steps)


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


def expected_share(
    recipe: RecipeOptions, *, layer: int, num_layers: int, step: int, max_steps: int, ffn_share: float
) -> float:
    """Return the share of a layer's FLOP that is computed on average at a step, `ffn_share` of it in its FFN."""
    place = {"layer": layer, "num_layers": num_layers, "step": step, "max_steps": max_steps}
    without, without_ffn = (probability(options, **place) for options in (recipe.layer_dropout, recipe.ffn_dropout))
    return (1 - without) * (1 - ffn_share * without_ffn)


def mean_share(recipe: RecipeOptions, *, num_layers: int, max_steps: int, ffn_share: float) -> float:
    """Return the share of all layers' FLOP that is computed on average over the whole training."""
    if not recipe.leaves_out:
        return 1.0
    steps = min(max_steps, _SAMPLED_STEPS)
    shares = [
        expected_share(recipe, layer=layer, num_layers=num_layers, step=step, max_steps=steps, ffn_share=ffn_share)
        for layer in range(num_layers)
        for step in range(steps)
    ]
    return sum(shares) / len(shares)


def _place(position: int, length: int) -> float:
    """Return 0 at the first of n positions and 1 at the last."""
    return position / (length - 1) if length > 1 else 1.0


def _rise(place: float) -> float:
    """Return 2^x - 1: 0 at 0 and 1 at 1, slowly at first."""
    return float(2.0**place - 1.0)
