"""Keys and values of the layers that ran: any subset of them, in any order."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class RouteCache(Cache):  # type: ignore[misc]  # transformers has no types
    """A cache of transformers in which a layer keeps the index that it has in the whole model.

    Layers that are left out stay empty or fall behind, so lengths follow from the `seen` positions instead of from a
    particular layer. The room for `capacity` positions is taken at once: a cache that grows copies itself every token.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        super().__init__(layers=[_RoomyLayer(capacity) for _ in range(num_layers)])
        self.capacity = capacity
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the positions before those that are running now."""
        return self.seen

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the position of the first query."""
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return how many keys the queries meet, and the position of the first."""
        return self.seen + query_length, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *arguments: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values of new positions, (B, H, t, D); return those of all positions, (B, H, seen + t, D)."""
        layer = self.layers[layer_idx]
        if layer.length != self.seen:
            raise ValueError(f"layer {layer_idx} has served {layer.length} positions, {self.seen} are needed")
        keys_and_values: tuple[Tensor, Tensor] = layer.update(key_states, value_states)
        return keys_and_values

    def forget(self, length: int, layers: Iterable[int]) -> None:
        """Go back to the first `length` positions in these layers."""
        for index in layers:
            self.layers[index].length = min(self.layers[index].length, length)

    @contextmanager
    def restored(self, first: int) -> Iterator[None]:
        """Leave the positions from `first` on as they were, whatever is run inside."""
        seen, kept = self.seen, [layer.copied(first) for layer in self.layers]
        yield
        self.seen = seen
        for layer, (keys, values) in zip(self.layers, kept, strict=True):
            layer.put(first, keys, values)


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """Keys and values of one layer, written into room that is there from the start."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.is_initialized = False
        self.capacity = capacity
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.keys, self.values = (self._room(states) for states in (key_states, value_states))
            self.is_initialized = True
        first, self.length = self.length, self.length + key_states.shape[-2]
        self.keys[:, :, first : self.length] = key_states
        self.values[:, :, first : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def copied(self, first: int) -> tuple[Tensor, Tensor]:
        """Return a copy of keys and values from a position on, (B, H, t, D)."""
        if not self.is_initialized:
            return torch.empty(0), torch.empty(0)
        return self.keys[:, :, first : self.length].clone(), self.values[:, :, first : self.length].clone()

    def put(self, first: int, keys: Tensor, values: Tensor) -> None:
        """Put back what was copied; it ends the layer's positions."""
        if keys.dim() == 4:
            self.length = first + keys.shape[2]
            self.keys[:, :, first : self.length], self.values[:, :, first : self.length] = keys, values
        else:
            self.length = 0

    def _room(self, states: Tensor) -> Tensor:
        rows, heads, _, width = states.shape
        return states.new_empty((rows, heads, self.capacity, width))

    def get_seq_length(self) -> int:
        return self.length
