"""Parts of a model that may be left out one by one, and what each costs."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import LayerSelection, half_flop
from skippipe.inference.key_value_cache import RouteCache
from skippipe.model.layer_halves import Block, HalfLayer, LayerOrHalf

TIMINGS = 5
BLOCKS: tuple[Block, Block] = ("attention", "feed_forward")

Subset = tuple[int, ...]
"""Numbers of the parts that run, in order."""


@dataclass(frozen=True)
class Part:
    """Layers, or half a layer, that run together or not at all."""

    layers: LayerSelection
    cost: float
    always: bool = False
    """Whether it may not be left out."""


def stage_parts(decoder: Decoder) -> list[Part]:
    """Return the stages that are there, each at a cost of 1; stage 0 always runs."""
    return [Part(decoder.stages[stage], 1.0, always=stage == 0) for stage in decoder.present_stages]


def layer_parts(decoder: Decoder) -> list[Part]:
    """Return the layers that are there, each at a cost of 1."""
    return [Part((layer,), 1.0) for layer in decoder.all_layers]


def half_parts(decoder: Decoder, costs: Sequence[float]) -> list[Part]:
    """Return attention and feed-forward block of each layer that is there, at these two costs."""
    blocks = list(zip(BLOCKS, costs, strict=True))
    return [Part((HalfLayer(layer, block),), cost) for layer in decoder.all_layers for block, cost in blocks]


def half_flops(decoder: Decoder, length: int) -> list[float]:
    """Return the FLOP of attention and feed-forward block for a token in the middle of a text."""
    flop = decoder.cost.layer_flop((length + 1) // 2)
    return [half_flop(block, flop, decoder.cost) for block in BLOCKS]


@torch.inference_mode()
def half_times(decoder: Decoder, length: int) -> list[float]:
    """Return the seconds of attention and feed-forward block for the token behind a text of `length` tokens.

    Measured with a KV cache over all layers at once, less what the model takes around its layers.
    """
    cache = RouteCache(decoder.num_layers, length + 1)
    text = decoder.embed(torch.zeros(1, length, dtype=torch.long, device=decoder.device))  # (1, T, D)
    decoder.run_layers(text, decoder.all_layers, cache=cache)
    cache.seen = length

    def seconds(layers: LayerSelection) -> float:
        start_s = time.perf_counter()
        decoder.run_layers(text[:, -1:], layers, cache=cache)
        if decoder.device.type == "cuda":
            torch.cuda.synchronize(decoder.device)
        duration_s = time.perf_counter() - start_s
        cache.forget(length, decoder.all_layers)
        return duration_s

    around_s = _median(seconds, ())
    halves = [tuple(HalfLayer(layer, block) for layer in decoder.all_layers) for block in BLOCKS]
    return [max(_median(seconds, layers) - around_s, 1e-9) / len(layers) for layers in halves]


def _median(seconds: Callable[[LayerSelection], float], layers: LayerSelection) -> float:
    seconds(layers)
    return statistics.median(seconds(layers) for _ in range(TIMINGS))


def selection_of(parts: Sequence[Part], subset: Iterable[int]) -> LayerSelection:
    """Return what runs; two halves of a layer are the layer."""
    layers: list[LayerOrHalf] = []
    for layer in (layer for number in subset for layer in parts[number].layers):
        before = layers[-1] if layers else None
        if isinstance(layer, HalfLayer) and isinstance(before, HalfLayer) and before.layer == layer.layer:
            layers[-1] = layer.layer
        else:
            layers.append(layer)
    return tuple(layers)


def subset_of(parts: Sequence[Part], layers: LayerSelection) -> Subset | None:
    """Return the parts that whole layers are made of; None where they are not made of whole parts."""
    wanted = set(layers)
    wanted |= {HalfLayer(layer, block) for layer in layers if isinstance(layer, int) for block in BLOCKS}
    subset = tuple(number for number, part in enumerate(parts) if wanted.issuperset(part.layers))
    return subset if set(selection_of(parts, subset)) == set(layers) else None


def cost_of(parts: Sequence[Part], subset: Iterable[int]) -> float:
    """Return the cost of the parts together."""
    return sum(parts[number].cost for number in subset)
