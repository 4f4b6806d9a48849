"""Skipping the feed-forward blocks of single tokens while their attention runs, so that the cache stays whole.

A block that is skipped adds nothing to the residual stream. The layers themselves are not changed: while the rule is
installed, a small module stands for each block and runs it on the tokens that need it alone.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from skippipe.inference.decoder import Decoder
from skippipe.model.architecture_traits import ArchitectureTraits


@dataclass(frozen=True)
class FfnRule:
    """In layers [first, last): after a block that hardly turns a token, the next `span` blocks are skipped for it."""

    first: int
    last: int
    warm_up: int
    """Positions at the start of a text that skip nothing."""
    threshold: float
    """Cosine of the residual stream before and after a block, from which on it hardly turns the token."""
    span: int


class FfnSkipping:
    """A rule at work on the layers of a decoder. B rows, T positions of the pass that runs, D hidden size."""

    def __init__(self, decoder: Decoder, rule: FfnRule) -> None:
        self.rule = rule
        self._ffn_flop = decoder.cost.ffn_flop
        self._skipped = 0
        self._may = torch.empty(0)
        """Which tokens may skip, (B, T)."""
        self._left = torch.empty(0)
        """How many blocks each token still skips, (B, T)."""
        self._none_may = self._none_left = True
        self.cosines: dict[int, Tensor] | None = None
        """Where set, the cosines of each layer are kept, (B, T)."""

    @property
    def skipped_flop(self) -> float:
        """FLOP that were not computed so far."""
        return self._skipped * self._ffn_flop

    def begin(self, position_ids: Tensor, is_token: Tensor | None = None) -> None:
        """Announce the positions (B, T) of the next pass; padding, where `is_token` is 0, skips nothing."""
        self._may = position_ids >= self.rule.warm_up
        if is_token is not None:
            self._may &= is_token[:, : position_ids.shape[1]].bool()
        self._left = torch.zeros_like(position_ids)
        self._none_may, self._none_left = not bool(self._may.any()), True

    def feed(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Return the block's output, (B, T, D), 0 for the tokens that skip it."""
        if self._none_left:
            whole: Tensor = block(hidden)
            return whole
        runs = self._left == 0  # (B, T)
        output = torch.zeros_like(hidden)
        if bool(runs.any()):
            output[runs] = block(hidden[runs].unsqueeze(0)).squeeze(0)  # (N, D)
        self._skipped += int((~runs).sum())
        return output

    def observe(self, layer: int, before: Tensor, after: Tensor) -> None:
        """Decide which tokens skip the next blocks; `before` and `after` are the residual stream, (B, T, D)."""
        if self._none_may:
            return
        cosine = functional.cosine_similarity(before.float(), after.float(), dim=-1)  # (B, T)
        starts = (self._left == 0) & self._may & (cosine >= self.rule.threshold)
        self._left = torch.where(starts, self.rule.span, (self._left - 1).clamp(min=0))
        self._none_left = not bool(self._left.any())
        if self.cosines is not None:
            self.cosines[layer] = cosine


@contextmanager
def skipping(decoder: Decoder, rule: FfnRule) -> Iterator[FfnSkipping]:
    """Install a rule on the layers of its region; raise `InputError` where they have no block of their own."""
    state = FfnSkipping(decoder, rule)
    traits = decoder.skeleton.traits
    sites = [_Site(decoder.layers[index], index, traits, state) for index in range(rule.first, rule.last)]
    try:
        for site in sites:
            site.install()
        yield state
    finally:
        for site in sites:
            site.remove()


class _Site:
    """One layer with the stand-in for its block, and the hooks that see the residual stream."""

    def __init__(self, layer: nn.Module, index: int, traits: ArchitectureTraits, state: FfnSkipping) -> None:
        self._layer, self._index, self._state = layer, index, state
        self._name = traits.feed_forward_name(layer)
        self._reader = traits.find_residual_reader(layer)
        self._block: nn.Module = getattr(layer, self._name)
        self._stand_in = _StandIn(self._block, state)
        self._before: Tensor | None = None
        self._handles: list[Any] = []

    def install(self) -> None:
        reader = self._stand_in if self._reader is self._block else self._reader
        setattr(self._layer, self._name, self._stand_in)
        self._handles.append(self._layer.register_forward_hook(self._after_layer))
        if reader is not None:
            self._handles.append(reader.register_forward_pre_hook(self._see_residual))

    def remove(self) -> None:
        setattr(self._layer, self._name, self._block)
        for handle in self._handles:
            handle.remove()

    def _see_residual(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._before = inputs[0]

    def _after_layer(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        before = self._before if self._reader is not None else output - self._stand_in.output
        if before is not None:
            self._state.observe(self._index, before, output)


class _StandIn(nn.Module):
    """Stands for a feed-forward block."""

    def __init__(self, block: nn.Module, state: FfnSkipping) -> None:
        super().__init__()
        self.block = block
        self.output = torch.empty(0)
        self._state = state

    def forward(self, hidden: Tensor) -> Tensor:
        self.output = self._state.feed(self.block, hidden)
        return self.output


NEVER = math.inf
"""A threshold that no cosine reaches."""
