"""Unified Layer Skipping (Liu et al. 2024, arXiv 2404.06954, section 3).

The prompt runs at full depth; every generated token runs the same layers, spread evenly, first and last included.
"""

from dataclasses import dataclass

from skippipe.errors import InputError
from skippipe.inference.depth_schedule import LayerSelection
from skippipe.inference.policies.base import Policy, PolicyContext, check_keep


@dataclass(frozen=True)
class UnifiedLayerSkipping(Policy):
    """All layers for the prompt, `layers` for what follows."""

    all_layers: LayerSelection
    layers: LayerSelection

    def layers_at(self, position: int, prompt_length: int) -> LayerSelection:
        """Return the layers for a position."""
        return self.all_layers if position < prompt_length else self.layers


def unified_layers(num_layers: int, kept: int) -> LayerSelection:
    """Return layer 0, multiples of the interval from 1 to L - 2 while there is room, and layer L - 1; 1 < kept <= L."""
    interval = num_layers // (kept - 1)
    between = range(interval, num_layers - 1, interval)[: kept - 2]
    return (0, *between, num_layers - 1)


def build(context: PolicyContext) -> Policy:
    """Return the policy for a speed-up of 1 / keep: floor(L keep) layers."""
    check_keep(context.keep)
    count = context.decoder.num_layers
    kept = int(count * context.keep + 1e-9)
    if kept < 2 or count < 2:
        raise InputError(
            f"--keep {context.keep}: policy unified runs the first and the last of {count} layers at least; "
            f"the smallest share is {2 / count:.2f}"
        )
    return UnifiedLayerSkipping(context.decoder.all_layers, unified_layers(count, kept))
