"""Weight gradients of a stage's matrix products, put off to a time of their own.

The backward of a linear layer is two products: the gradient by its input, which the layers before wait for, and the
gradient by its weight, which nobody does. While they are put off, the second one is only noted, with the input and
the output's gradient that it needs. All other gradients (norms, biases, experts of a mixture) stay where they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

DEFERRABLE = (nn.Linear, Conv1D)
"""Layers whose weight gradient can be put off; those of other classes keep their own backward."""


def is_deferrable(module: nn.Module) -> bool:
    """Return whether the weight gradient of `module` can be put off."""
    return type(module) in DEFERRABLE


def weight_of(module: nn.Module) -> nn.Parameter:
    """Return the weight of a deferrable layer: (outputs, inputs), of a Conv1D (inputs, outputs)."""
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    return weight


def output_size(module: nn.Module) -> int:
    """Return the size of a deferrable layer's output."""
    return weight_of(module).shape[0 if isinstance(module, nn.Linear) else 1]


def input_size(module: nn.Module) -> int:
    """Return the size of a deferrable layer's input."""
    return weight_of(module).shape[1 if isinstance(module, nn.Linear) else 0]


class Product(NamedTuple):
    """One weight gradient to come: of `inputs` (..., n) and the gradient (..., m) by the layer's output."""

    module: nn.Module
    inputs: Tensor
    gradient: Tensor

    def add(self) -> None:
        """Compute it and add it to the weight's gradient."""
        weight = weight_of(self.module)
        computed = _weight_gradient(self.module, self.inputs, self.gradient)
        if weight.grad is None:
            weight.grad = computed
        else:
            weight.grad.add_(computed)


class WeightGradients:
    """Lets the layers inside `module` put off their weight gradients; they do so only within `deferred`."""

    def __init__(self, module: nn.Module) -> None:
        self.noted: list[Product] | None = None
        for layer in module.modules():
            if is_deferrable(layer):
                layer.forward = partial(_forward, layer, self)

    @contextmanager
    def deferred(self) -> Iterator[list[Product]]:
        """Note the weight gradients of a backward in the list that is given, instead of computing them."""
        noted: list[Product] = []
        self.noted = noted
        try:
            yield noted
        finally:
            self.noted = None


def _forward(layer: nn.Module, gradients: WeightGradients, inputs: Tensor) -> Tensor:
    output: Tensor = _Product.apply(inputs, layer.weight, layer.bias, layer, gradients)  # type: ignore[no-untyped-call]
    return output


class _Product(torch.autograd.Function):
    """A linear layer with a backward in two parts."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.Module, gradients: WeightGradients
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.layer, ctx.gradients = layer, gradients
        output: Tensor = type(layer).forward(layer, inputs)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        inputs, weight = ctx.saved_tensors
        by_inputs = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_inputs = gradient @ (weight if isinstance(ctx.layer, nn.Linear) else weight.t())
        if ctx.needs_input_grad[1]:
            if ctx.gradients.noted is None:
                by_weight = _weight_gradient(ctx.layer, inputs, gradient)
            else:
                ctx.gradients.noted.append(Product(ctx.layer, inputs, gradient))
        if ctx.needs_input_grad[2]:
            by_bias = gradient.flatten(0, -2).sum(0)
        return by_inputs, by_weight, by_bias, None, None


def _weight_gradient(layer: nn.Module, inputs: Tensor, gradient: Tensor) -> Tensor:
    inputs, gradient = inputs.flatten(0, -2), gradient.flatten(0, -2)  # (tokens, n), (tokens, m)
    return gradient.t() @ inputs if isinstance(layer, nn.Linear) else inputs.t() @ gradient
