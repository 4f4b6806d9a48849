"""Keys and values of the layers that ran: any subset of them, in any order."""

from collections.abc import Iterable
from typing import Any

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

    def _room(self, states: Tensor) -> Tensor:
        rows, heads, _, width = states.shape
        return states.new_empty((rows, heads, self.capacity, width))

    def get_seq_length(self) -> int:
        return self.length
