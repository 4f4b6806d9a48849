"""The layers of an evaluated policy as a file."""

import math
from collections.abc import Sequence
from pathlib import Path

from skippipe.checkpoint.layer_choice import LayerChoice, blocks_of, write_choice
from skippipe.errors import InputError
from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import LayerSelection, share_computed
from skippipe.inference.policies.base import Policy, fixed_layers
from skippipe.monitor.evaluation_results import Evaluation


def check_choice(built: Sequence[tuple[str, float | None, Policy]], decoder: Decoder) -> None:
    """Raise `InputError` where what is evaluated is no single choice of layers."""
    if len(built) != 1:
        raise InputError(f"--save-choice: {len(built)} choices are evaluated here; give one --policy and one --keep")
    blocks_of(_layers(built[0][2], decoder))


def save_choice(evaluation: Evaluation, policy: Policy, decoder: Decoder, path: Path) -> None:
    """Write the layers that the policy runs after a prompt; raise `SkipPipeError` where that fails."""
    layers, result = _layers(policy, decoder), evaluation.results[0]
    attention, feed_forward = blocks_of(layers)
    choice = LayerChoice(
        model=evaluation.model,
        checkpoint=evaluation.checkpoint,
        policy=result.policy,
        keep=result.keep,
        share_computed=share_computed([layers], decoder.num_layers, decoder.cost),
        perplexity=result.perplexity if math.isfinite(result.perplexity) else None,
        num_layers=decoder.num_layers,
        attention=attention,
        feed_forward=feed_forward,
    )
    write_choice(choice, path)


def _layers(policy: Policy, decoder: Decoder) -> LayerSelection:
    layers = fixed_layers(policy, decoder) if policy.sample(0) is policy else None
    if layers is None:
        raise InputError(
            "--save-choice: the policy does not run the same layers at every position; use best, unified, exit or "
            "stages:..."
        )
    return layers
