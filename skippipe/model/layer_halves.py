"""One half of a decoder layer: its attention or its feed-forward block, while the other adds nothing."""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from skippipe.errors import InputError
from skippipe.model.skeleton import Skeleton

Block = Literal["attention", "feed_forward"]


@dataclass(frozen=True)
class HalfLayer:
    """A layer of which one block alone runs."""

    layer: int
    block: Block


LayerOrHalf = int | HalfLayer
"""The index of a whole layer, or a half."""


def index_of(layer: LayerOrHalf) -> int:
    """Return the index of a layer, from 0, of which all or a half runs."""
    return layer.layer if isinstance(layer, HalfLayer) else layer


def half_module(skeleton: Skeleton, half: HalfLayer) -> nn.Module:
    """Return the layer with one of its blocks alone; it shares the weights. Raise `InputError` where it has no such."""
    layer = skeleton.layers[half.layer]
    feed_forward, attention = skeleton.traits.feed_forward_name(layer), skeleton.traits.attention
    clone = copy.copy(layer)
    clone._modules = dict(layer._modules)
    if not isinstance(clone._modules.get(attention), nn.Module):
        raise InputError(f"layers of type {type(layer).__name__} have no {attention!r}; leave whole layers out")
    if half.block == "attention":
        clone._modules[feed_forward] = _NoFeedForward()
    else:
        clone._modules[attention] = _NoAttention()
    return clone


class _NoFeedForward(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return torch.zeros_like(hidden)


class _NoAttention(nn.Module):
    """Stands for an attention, which returns its weights too."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None
