"""The layers of a file that `skippipe evaluate --save-choice` wrote."""

from pathlib import Path

from skippipe.checkpoint.layer_choice import read_choice
from skippipe.config.places import expanded
from skippipe.inference.policies.base import FixedLayers, Policy, PolicyContext, check_layers_are_here
from skippipe.model.layer_halves import HalfLayer


def build(context: PolicyContext) -> Policy:
    """Return the layers of `file:CHOICE`, prompt and answer alike."""
    path = Path(expanded(context.argument, "--policy file"))
    choice = read_choice(path)
    choice.require_depth(context.decoder.num_layers, path)
    if any(isinstance(layer, HalfLayer) for layer in choice.layers):
        check_layers_are_here(context.decoder, f"file:{path}")
    return FixedLayers(choice.layers)
