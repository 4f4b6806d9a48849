"""Which layers run for which positions of a sequence, when the depth may shrink from position to position.

The layers that run at a position are always among those of the position before, in the same order. So every layer
serves a prefix of the positions: whoever attends finds the keys and values of all earlier positions, and a whole
sequence is computed at once by running each layer on the prefix that it serves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from skippipe.errors import InputError
from skippipe.model.cost import TokenCost
from skippipe.model.layer_halves import Block, HalfLayer, LayerOrHalf, index_of

LayerSelection = tuple[LayerOrHalf, ...]
"""Indices of layers, or halves of layers, in the order in which they run."""


@dataclass(frozen=True)
class Flop:
    """FLOP of all layers for some positions, and of those layers that ran; head and embedding apart."""

    whole: float = 0.0
    computed: float = 0.0

    @property
    def share(self) -> float:
        """Share that was computed; 1 where there was nothing to compute."""
        return self.computed / self.whole if self.whole else 1.0

    def __add__(self, other: "Flop") -> "Flop":
        return Flop(self.whole + other.whole, self.computed + other.computed)


@dataclass(frozen=True)
class Segment:
    """Layers that run one after the other for the same positions: the first `served` of a sequence."""

    layers: LayerSelection
    served: int


def segments(layers_of: Sequence[LayerSelection]) -> tuple[Segment, ...]:
    """Return the segments of a sequence, in order; `layers_of` has the layers of each position.

    Raises `InputError` where layers come back, or run in another order, after a position that left them out.
    """
    served = dict.fromkeys(layers_of[0], 0)
    before = layers_of[0]
    for layers in layers_of:
        check_shrinks(before, layers)
        before = layers
        for layer in layers:
            served[layer] += 1
    found: list[Segment] = []
    for layer, count in served.items():
        if found and found[-1].served == count:
            found[-1] = Segment((*found[-1].layers, layer), count)
        else:
            found.append(Segment((layer,), count))
    return tuple(found)


def check_shrinks(before: LayerSelection, layers: LayerSelection) -> None:
    """Raise `InputError` where `layers` cannot follow those of the position `before`, whose keys they attend to."""
    rest = iter(before)
    if layers != before and not all(layer in rest for layer in layers):
        raise InputError(
            f"layers {_listed(layers)} follow {_listed(before)}: from one position to the next, layers may only go, "
            "and the others keep their order; correct the policy"
        )


def check_known(route: Sequence[Segment], num_layers: int) -> None:
    """Raise `InputError` for a layer that a model of `num_layers` does not have."""
    for layer in (layer for segment in route for layer in segment.layers):
        if not 0 <= index_of(layer) < num_layers:
            raise InputError(f"layer {layer}: the model has {num_layers} layers, counted from 0; correct the policy")


def _listed(layers: Sequence[LayerOrHalf]) -> str:
    return ", ".join(map(str, layers)) or "none"


def share_computed(
    layers_of: Sequence[LayerSelection], num_layers: int, cost: TokenCost, *, skipped_flop: float = 0.0
) -> float:
    """Return the share of all layers' FLOP that a sequence computes, head and embedding apart.

    `skipped_flop` was left out inside layers that ran.
    """
    flop = flop_of(layers_of, num_layers, cost)
    return 1 - (flop.whole - flop.computed + skipped_flop) / flop.whole


def flop_of(layers_of: Sequence[LayerSelection], num_layers: int, cost: TokenCost, first: int = 0) -> Flop:
    """Return the FLOP of a sequence from position `first` on, of which `layers_of` has the layers of each."""
    layer_flop = [cost.layer_flop(position + 1) for position in range(first, first + len(layers_of))]
    left_out = sum((num_layers - len(layers)) * flop for layers, flop in zip(layers_of, layer_flop, strict=True))
    whole = num_layers * sum(layer_flop)
    for layers, flop in zip(layers_of, layer_flop, strict=True):
        left_out += sum(flop - half_flop(half.block, flop, cost) for half in layers if isinstance(half, HalfLayer))
    return Flop(whole, whole - left_out)


def half_flop(block: Block, layer_flop: float, cost: TokenCost) -> float:
    """Return the FLOP of one block of a layer whose whole takes `layer_flop`."""
    return layer_flop - cost.ffn_flop if block == "attention" else cost.ffn_flop


def layers_run(layers: LayerSelection) -> float:
    """Return how many layers run; a half is half a layer."""
    return sum(0.5 if isinstance(layer, HalfLayer) else 1.0 for layer in layers)
