"""One character a layer: what a policy runs after the prompt."""

from collections.abc import Sequence
from typing import TypeGuard

from skippipe.inference.decoder import Decoder
from skippipe.inference.policies.base import Policy
from skippipe.model.layer_halves import HalfLayer, LayerOrHalf
from skippipe.monitor.evaluation_results import ALWAYS, AT_TIMES, ATTENTION, FEED_FORWARD, IN_PART, NEVER_RUN

DRAWS = 32
"""Choices that are looked at where a policy draws at random."""


def draw_layers(policy: Policy, decoder: Decoder, positions: Sequence[int], prompt_length: int) -> str:
    """Return the layers that run at these positions, one character each, as `DepthResult.layers` has them.

    Args:
        policy: The policy; of one that draws at random, some choices are looked at.
        decoder: The model.
        positions: The positions that count; at least one.
        prompt_length: How many of the first positions of the text are its prompt.
    """
    is_random = policy.sample(0) is not policy
    choices = [policy.sample(index) for index in range(DRAWS)] if is_random else [policy]
    selections = {choice.layers_at(position, prompt_length) for choice in choices for position in positions}
    characters = []
    for layer in range(decoder.num_layers):
        count = sum(layer in selection for selection in selections)
        half = {part.block for selection in selections for part in selection if _is_half_of(part, layer)}
        if half:
            characters.append(ATTENTION if half == {"attention"} else FEED_FORWARD)
        elif 0 < count < len(selections):
            characters.append(AT_TIMES)
        elif not count:
            characters.append(NEVER_RUN)
        else:
            characters.append(IN_PART if layer in policy.layers_in_part else ALWAYS)
    return "".join(characters)


def _is_half_of(part: LayerOrHalf, layer: int) -> TypeGuard[HalfLayer]:
    return isinstance(part, HalfLayer) and part.layer == layer
