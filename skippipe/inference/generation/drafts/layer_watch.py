"""What the layers do in a pass of the whole model, seen from outside: hidden states, attentions, and their times."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from skippipe.inference.decoder import Decoder
from skippipe.inference.generation.drafts.clock import now_s


@dataclass
class LayerWatch:
    """A pass, by layer. B rows, D hidden size; the last t columns of the pass."""

    num_columns: int
    before: list[Tensor] = field(default_factory=list)
    """Hidden state before each layer, (B, t, D)."""
    attention: list[Tensor] = field(default_factory=list)
    """What the attention of each layer returned, (B, t, D); fewer where layers have none."""
    after: list[Tensor] = field(default_factory=list)
    """Hidden state behind each layer, (B, t, D)."""
    attention_s: list[float] = field(default_factory=list)
    layer_s: list[float] = field(default_factory=list)

    @property
    def has_halves(self) -> bool:
        """Whether every layer has an attention."""
        return len(self.attention) == len(self.before)

    def influence(self) -> list[float]:
        """Return how much each layer turns the hidden state: 1 less the cosine."""
        return [_turn(before, after) for before, after in zip(self.before, self.after, strict=True)]

    def influence_of_halves(self) -> list[float]:
        """Return the same of attention and feed-forward block of each layer, one after the other."""
        turns: list[float] = []
        for before, attention, after in zip(self.before, self.attention, self.after, strict=True):
            turns += (_turn(before, before + attention), _turn(before + attention, after))
        return turns

    @property
    def half_times_s(self) -> tuple[float, float]:
        """Seconds of an attention and of the rest of a layer, on the mean."""
        layer_s = sum(self.layer_s) / len(self.layer_s)
        attention_s = sum(self.attention_s) / len(self.layer_s)
        return attention_s, max(layer_s - attention_s, 0.0)

    @contextmanager
    def installed(self, decoder: Decoder) -> Iterator[None]:
        """Watch the next pass of all layers."""
        handles: list[Any] = []
        name = decoder.skeleton.traits.attention
        for index in decoder.all_layers:
            layer = decoder.layers[index]
            handles += self._hooks(layer, decoder.device, self.layer_s, self.before, self.after)
            if (attention := getattr(layer, name, None)) is not None:
                handles += self._hooks(attention, decoder.device, self.attention_s, None, self.attention)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(
        self,
        module: nn.Module,
        device: torch.device,
        times_s: list[float],
        before: list[Tensor] | None,
        after: list[Tensor],
    ) -> Iterator[Any]:
        start_s = 0.0

        def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal start_s
            if before is not None:
                before.append(inputs[0][:, -self.num_columns :])
            start_s = now_s(device)

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            times_s.append(now_s(device) - start_s)
            hidden = output[0] if isinstance(output, tuple) else output
            after.append(hidden[:, -self.num_columns :])

        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave)


def _turn(before: Tensor, after: Tensor) -> float:
    return 1 - float(functional.cosine_similarity(before.float(), after.float(), dim=-1).mean())
