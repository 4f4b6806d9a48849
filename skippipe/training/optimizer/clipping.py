"""Gradient clipping by the global norm over all ranks, each parameter counted once."""

import math
from collections.abc import Iterable

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


def clip_factor(norm: float, max_norm: float) -> float:
    """Return what clipping multiplies gradients by: 1 where the norm is small enough, or not finite."""
    return min(1.0, max_norm / (norm + 1e-6)) if math.isfinite(norm) else 1.0
