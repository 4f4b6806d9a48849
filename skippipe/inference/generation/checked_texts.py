"""Texts of a batch in step, before which a part of the model drafts tokens and the whole of it checks them.

Layers at the bottom that draft and model share in the same order are computed once for a drafted token: their keys,
values and outputs stay for the check (LayerSkip, Elhoushi et al. 2024, arXiv 2404.16710, 3.3). What the draft's other
layers wrote is forgotten before the check.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import LayerSelection, Segment
from skippipe.inference.generation.generation import Prompts
from skippipe.inference.key_value_cache import RouteCache


@dataclass(frozen=True)
class DraftLayers:
    """The layers of a draft: those at the bottom that the whole model begins with too, and its others."""

    shared: LayerSelection
    own: LayerSelection

    @classmethod
    def of(cls, draft: LayerSelection, layers: LayerSelection) -> "DraftLayers":
        """Split a draft for a model of these layers."""
        common = next((at for at, layer in enumerate(draft) if layer != layers[at]), len(draft))
        return cls(draft[:common], draft[common:])


class CheckedTexts:
    """Texts whose tokens all come from full depth, and drafts behind them. B rows, D hidden size, V vocabulary.

    All but the newest token of each text are in the cache.
    """

    def __init__(self, decoder: Decoder, batch: Prompts, max_new_tokens: int) -> None:
        self.decoder, self.prompt_length = decoder, batch.ids.shape[1]
        self.length = self.prompt_length
        """Columns that are known, prompts included."""
        self.ids = torch.cat([batch.ids, batch.ids.new_zeros(len(batch.ids), max_new_tokens)], dim=1)
        """(B, P + N); behind `length`, what is drafted."""
        self.choices = torch.full_like(self.ids, -1)
        """Likeliest next token after each column at full depth, (B, P + N); -1 where that was not computed."""
        self._position_ids, self._mask = batch.position_ids, batch.mask
        self._cache = RouteCache(decoder.num_layers, self.ids.shape[1])
        self._hidden: list[Tensor] = []
        """Output of the draft's shared layers for the newest token and the drafted ones, (B, 1, D)."""

    @property
    def text(self) -> Tensor:
        """The texts so far, (B, length)."""
        return self.ids[:, : self.length]

    def read(self, *, num_known: int = 1) -> Tensor:
        """Run the prompts; return the logits after them, (B, V). Choices of the last `num_known` columns are kept."""
        self._cache.seen = 0
        logits = self._whole(slice(0, self.length), num_last=num_known)
        return logits[:, -1]

    def draft(self, layers: DraftLayers, column: int) -> Tensor:
        """Run the draft's layers for one column, the one behind the last; return the logits after it, (B, V)."""
        hidden = self._shared_output(layers, column)
        if layers.own:
            self._cache.seen = column
            hidden = self._run(hidden, layers.own, slice(column, column + 1))
            self._cache.seen = column + 1
        return self.decoder.head(hidden)[:, -1]

    def check(self, layers: DraftLayers | None, num_drafted: int) -> Tensor:
        """Return what full depth says after the newest token and the drafted ones, (B, 1 + num_drafted, V)."""
        first = self.length - 1
        columns = slice(first, self.length + num_drafted)
        if layers is None or not layers.shared or num_drafted == 0:
            self._go_back(first)
            return self._whole(columns)
        self._shared_output(layers, self.length + num_drafted - 1)
        rest = self.decoder.all_layers[len(layers.shared) :]
        self._cache.forget(first, rest)
        self._cache.seen = first
        hidden = torch.cat(self._hidden, dim=1)  # (B, t, D)
        if rest:
            hidden = self._run(hidden, rest, columns)
        logits = self.decoder.head(hidden)
        self.choices[:, columns] = logits.argmax(dim=-1)
        return logits

    def append(self, tokens: Tensor) -> None:
        """Add a checked token to each text, (B,)."""
        self.ids[:, self.length] = tokens
        self.length += 1

    def settle(self) -> None:
        """Forget what was drafted behind the newest tokens."""
        self._go_back(self.length - 1)

    def again(self, layers: LayerSelection, columns: slice) -> Tensor:
        """Run layers on known columns behind the cache at full depth, which stays; return hidden states, (B, t, D)."""
        with self._cache.restored(columns.start):
            self._go_back(columns.start)
            hidden = self.decoder.embed(self.ids[:, columns], self._position_ids[:, columns])
            return self._run(hidden, layers, columns)

    def _run(self, hidden: Tensor, layers: LayerSelection, columns: slice) -> Tensor:
        return self.decoder.run_layers(hidden, layers, self._position_ids[:, columns], self._mask, self._cache)

    def _whole(self, columns: slice, num_last: int = 0) -> Tensor:
        logits = self.decoder.logits(
            self.ids[:, columns],
            (Segment(self.decoder.all_layers, columns.stop - columns.start),),
            position_ids=self._position_ids[:, columns],
            attention_mask=self._mask,
            cache=self._cache,
            num_last=num_last,
        )
        self.choices[:, columns.stop - logits.shape[1] : columns.stop] = logits.argmax(dim=-1)
        return logits

    def _shared_output(self, layers: DraftLayers, column: int) -> Tensor:
        """Run the shared layers for the next column; (B, 1, D)."""
        at = slice(column, column + 1)
        hidden = self.decoder.embed(
            self.ids[:, at], self._position_ids[:, at], self._mask, layers=layers.shared, cache=self._cache
        )
        self._cache.seen = column + 1
        self._hidden.append(hidden)
        return hidden

    def _go_back(self, length: int) -> None:
        self._cache.forget(length, range(self.decoder.num_layers))
        self._cache.seen = length
        self._hidden.clear()
