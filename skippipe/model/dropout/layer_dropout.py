"""Layers and feed-forward parts that some samples leave out in training.

A sample that leaves a layer out keeps its hidden state; one that leaves an FFN out gets nothing added by it. What is
left out is not computed. The draws follow from the seed, the step, the microbatch and the layer, not from who computes
when: any number of ranks, a resumed run, and a layer that is computed again in its backward draw the same.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skippipe.config.recipe_options import DropoutOptions, RecipeOptions
from skippipe.errors import ConfigError
from skippipe.model.dropout.probability import kept_samples, probability
from skippipe.model.stage import Stage


class StageDropout:
    """Lets the layers of one stage leave out what the recipe says; it needs to know which microbatch is computed.

    It takes the place of another that the stage had before, as in the epoch of other members.
    """

    def __init__(
        self,
        stage: Stage,
        recipe: RecipeOptions,
        *,
        num_layers: int,
        micro_batch_size: int,
        max_steps: int,
        seed: int,
    ) -> None:
        self._recipe = recipe
        self._num_layers, self._num_samples = num_layers, micro_batch_size
        self._max_steps, self._seed = max_steps, seed
        self._step = self._microbatch = 0
        layers = stage.layers
        for place, wrapped in enumerate(layers):
            index, layer = stage.first + place, _whole(wrapped)
            if recipe.ffn_dropout.probability > 0:
                name = _ffn_name(layer, stage)
                ffn = _whole(getattr(layer, name))
                setattr(layer, name, LeftOut(ffn, partial(self._run_ffn, index), torch.zeros_like))
            if recipe.layer_dropout.probability > 0:
                layers[place] = LeftOut(layer, partial(self._run_layer, index), _unchanged, partial(self._scale, index))

    def begin(self, step: int, microbatch: int) -> None:
        """Say which microbatch of which step, counted from 0, is computed next, forward or backward."""
        self._step, self._microbatch = step, microbatch

    def _run_layer(self, layer: int) -> Sequence[int]:
        """Return the samples of the microbatch that run a layer."""
        return self._kept("layer", self._recipe.layer_dropout, layer)

    def _run_ffn(self, layer: int) -> Sequence[int]:
        """Return the places, among the samples that run the layer, of those that run its FFN."""
        kept = self._kept("ffn", self._recipe.ffn_dropout, layer)
        return [place for place, sample in enumerate(self._run_layer(layer)) if sample in kept]

    def _scale(self, layer: int) -> float:
        """Return by what a layer's residual is multiplied where it is run."""
        options = self._recipe.layer_dropout
        return 1.0 / (1.0 - self._probability(options, layer)) if options.rescale else 1.0

    def _kept(self, part: str, options: DropoutOptions, layer: int) -> tuple[int, ...]:
        key = self._seed, part, self._step, self._microbatch, layer
        return kept_samples(options, self._probability(options, layer), self._num_samples, key)

    def _probability(self, options: DropoutOptions, layer: int) -> float:
        return probability(
            options, layer=layer, num_layers=self._num_layers, step=self._step, max_steps=self._max_steps
        )


class LeftOut(nn.Module):
    """A module that in training runs on the kept samples alone; the others get `otherwise` of their input.

    What it makes of a kept sample is moved `scale` times as far from `otherwise`.
    """

    def __init__(
        self,
        inner: nn.Module,
        kept: Callable[[], Sequence[int]],
        otherwise: Callable[[Tensor], Tensor],
        scale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        super().__init__()
        self.inner = inner
        self._kept = kept
        self._otherwise = otherwise
        self._scale = scale

    def __getattr__(self, name: str) -> Any:
        """Show what the model may ask of a layer, such as the kind of its attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """Return (B, T, D) for `hidden` (B, T, D); other arguments are cut to the kept samples where they have B."""
        if not self.training:
            evaluated: Tensor = self.inner(hidden, *arguments, **options)
            return evaluated
        kept, num_samples = self._kept(), hidden.shape[0]
        left_out = self._otherwise(hidden)
        if len(kept) == num_samples:
            return rescaled(left_out, self.inner(hidden, *arguments, **options), self._scale())
        if not kept:
            return left_out
        index = torch.tensor(kept, device=hidden.device)  # (K,)
        cut_arguments = [_cut(argument, index, num_samples) for argument in arguments]
        cut_options = {name: _cut(option, index, num_samples) for name, option in options.items()}
        computed = self.inner(hidden[index], *cut_arguments, **cut_options)  # (K, T, D)
        return left_out.index_copy(0, index, rescaled(left_out[index], computed, self._scale()))


def _whole(module: nn.Module) -> nn.Module:
    """Return a module without what an earlier dropout put around it."""
    return module.inner if isinstance(module, LeftOut) else module


def rescaled(start: Tensor, end: Tensor, scale: float) -> Tensor:
    """Return what lies `scale` times as far from `start` as `end`, of any shape; `end` itself for 1."""
    return end if scale == 1 else torch.lerp(start, end, scale)


def _cut(argument: Any, index: Tensor, num_samples: int) -> Any:
    """Return the rows of the kept samples, also of tensors in a tuple; what is the same for all samples stays."""
    if isinstance(argument, tuple):
        return tuple(_cut(part, index, num_samples) for part in argument)
    if isinstance(argument, Tensor) and argument.ndim > 1 and argument.shape[0] == num_samples:
        return argument[index]
    return argument


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden


def _ffn_name(layer: nn.Module, stage: Stage) -> str:
    name = stage.traits.find_feed_forward(layer)
    if name is None:
        raise ConfigError(
            f"recipe.ffn_dropout: the layers of {stage.body.config.model_type!r} have no feed-forward part of their "
            "own; use recipe.layer_dropout"
        )
    return name
