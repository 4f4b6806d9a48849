"""Gradient clipping by the global norm over all ranks, each parameter counted once."""

import math
from collections.abc import Iterable

import torch
from torch import nn


def squared_norm(parameters: Iterable[nn.Parameter]) -> float:
    """Return the sum of squares of the gradients, accumulated in float64; no gradient counts as zero."""
    norms = [
        torch.linalg.vector_norm(parameter.grad, dtype=torch.float64)
        for parameter in parameters
        if parameter.grad is not None
    ]
    return float(torch.stack(norms).square().sum()) if norms else 0.0


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], norm: float, max_norm: float) -> None:
    """Scale all gradients by max_norm / norm where the global `norm` is larger (as torch's clip_grad_norm_ does)."""
    factor = max_norm / (norm + 1e-6)
    if math.isfinite(norm) and factor < 1.0:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
