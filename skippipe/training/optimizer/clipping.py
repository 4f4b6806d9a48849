"""Gradient clipping by the global norm over all ranks, each parameter counted once."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def squared_norm(parameters: Iterable[nn.Parameter]) -> float:
    """Return the sum of squares of the gradients, accumulated in float64; no gradient counts as zero."""
    return squared_norm_of(parameter.grad for parameter in parameters if parameter.grad is not None)


def squared_norm_of(gradients: Iterable[Tensor]) -> float:
    """Return the sum of squares of tensors, accumulated in float64."""
    norms = [torch.linalg.vector_norm(gradient.detach(), dtype=torch.float64) for gradient in gradients]
    return float(torch.stack(norms).square().sum()) if norms else 0.0


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], norm: float, max_norm: float) -> None:
    """Scale all gradients by max_norm / norm where the global `norm` is larger (as torch's clip_grad_norm_ does)."""
    factor = clip_factor(norm, max_norm)
    if factor < 1.0:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


class WholeGradients:
    """The part of an optimizer that needs nothing but gradients, where every replica has all that the runner summed."""

    _parameters: dict[str, nn.Parameter]

    @property
    def reduce(self) -> Callable[[float], None] | None:
        """None: the runner sums the gradients."""
        return None

    def squared_norm(self, owned: Iterable[nn.Parameter]) -> float:
        """Return the squared norm of the gradients of `owned`; see `OptimizerBackend`."""
        return squared_norm(owned)

    def clip(self, norm: float, max_norm: float) -> None:
        """Scale the gradients where the global norm is too large; see `OptimizerBackend`."""
        clip(self._parameters.values(), norm, max_norm)

    def close(self) -> None:
        """Return at once: there is nothing to release."""


def clip_factor(norm: float, max_norm: float) -> float:
    """Return what clipping multiplies gradients by: 1 where the norm is small enough, or not finite."""
    return min(1.0, max_norm / (norm + 1e-6)) if math.isfinite(norm) else 1.0
