"""Clipping by the global norm: the same as torch's on the whole model."""

import math

import pytest
import torch
from torch import nn

from skippipe.training.optimizer.clipping import clip, squared_norm


def make_parameters(scale: float) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((7, 5), (5,), (3, 2, 2))]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
    return [*parameters, nn.Parameter(torch.zeros(2))]  # the last one has no gradient


@pytest.mark.parametrize("scale", [0.01, 1.0, 1e4])
def test_equals_torch(scale: float) -> None:
    ours, theirs = make_parameters(scale), make_parameters(scale)
    # Two ranks, each with a part of the model.
    norm = math.sqrt(squared_norm(ours[:2]) + squared_norm(ours[2:]))
    clip(ours, norm, max_norm=1.0)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm=1.0)
    assert norm == pytest.approx(float(expected), rel=1e-6)
    for own, their in zip(ours[:3], theirs[:3], strict=True):
        torch.testing.assert_close(own.grad, their.grad, rtol=1e-6, atol=0)


def test_sum_of_squares_does_not_overflow_in_low_precision() -> None:
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    parameter.grad = torch.full((4,), 1e30, dtype=torch.bfloat16)
    assert squared_norm([parameter]) == pytest.approx(4e60, rel=0.02)


def test_no_gradients_have_norm_zero() -> None:
    assert squared_norm([nn.Parameter(torch.zeros(3))]) == 0.0
    assert squared_norm([]) == 0.0


def test_infinite_norm_leaves_gradients_alone() -> None:
    parameters = make_parameters(1.0)
    before = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    clip(parameters, math.inf, max_norm=1.0)
    for parameter, gradient in zip(parameters, before, strict=False):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)
