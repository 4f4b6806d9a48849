"""Unified Layer Skipping (Liu et al. 2024, arXiv 2404.06954, section 3).

The prompt runs at full depth; every generated token runs the same layers, spread evenly, first and last included. The
paper takes multiples of an interval, which leaves out a block at the end where the interval comes to 1, as at nine
tenths of 30 layers. So its choice is taken where it is even, and the evenest one elsewhere.
"""

from dataclasses import dataclass
from itertools import pairwise

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


def unified_layers(num_layers: int, kept: int) -> tuple[int, ...]:
    """Return the layers that run, the first and the last among them; 1 < kept <= L.

    Where layers left out would not have to stand side by side none do, and the runs of layers between them differ by at
    most one in length; elsewhere the gaps between the layers that run do.
    """
    published = _multiples_of_the_interval(num_layers, kept)
    return published if _is_even(published, num_layers) else _evenest(num_layers, kept)


def _multiples_of_the_interval(num_layers: int, kept: int) -> tuple[int, ...]:
    """Return layer 0, multiples of the interval from 1 to L - 2 while there is room, and layer L - 1."""
    interval = num_layers // (kept - 1)
    between = range(interval, num_layers - 1, interval)[: kept - 2]
    return (0, *between, num_layers - 1)


def _is_even(layers: tuple[int, ...], num_layers: int) -> bool:
    """Whether neither the distances between layers that run nor those between layers left out differ by more than one.

    Distances of layers left out count from before the first layer to behind the last; they matter where those are few.
    """
    left_out = (-1, *(layer for layer in range(num_layers) if layer not in layers), num_layers)
    rows = [layers] if len(left_out) - 2 >= len(layers) else [layers, left_out]
    distances = [[after - before for before, after in pairwise(row)] for row in rows]
    return all(max(row) - min(row) <= 1 for row in distances)


def _evenest(num_layers: int, kept: int) -> tuple[int, ...]:
    """Return the layers whose distances, or those of the layers left out where these are fewer, differ by at most 1."""
    gone = num_layers - kept
    if gone >= kept:
        return tuple(_rounded(index * (num_layers - 1), kept - 1) for index in range(kept))
    left_out = {_rounded(index * (num_layers + 1), gone + 1) - 1 for index in range(1, gone + 1)}
    return tuple(layer for layer in range(num_layers) if layer not in left_out)


def _rounded(numerator: int, denominator: int) -> int:
    """Return the nearest whole number, the higher one of two."""
    return (2 * numerator + denominator) // (2 * denominator)


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
