"""The mean cross entropy of a head with a large vocabulary, a chunk of tokens at a time.

The logits of a microbatch are the largest tensor of a training: 16,384 tokens by 128,256 words take 7.8 GiB in fp32,
and three times that with their logarithms and gradient. Here those of one chunk are alive at a time. A chunk's
gradients by the hidden state and by the head's weights are computed with its loss and kept in place of the logits, so
that nothing is computed twice.
(The custom of the field: Liger Kernel, arXiv 2410.10989; Cut Your Losses, arXiv 2411.09009.)
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

CHUNK_TOKENS = 1024
"""Tokens whose logits are alive at the same time.

Chosen: with a vocabulary of 128,256 a chunk takes 1 GiB in bfloat16, as much as the head of a model of hidden size
4,096. To make and add up a chunk's gradient by the head (V x D numbers in bfloat16) moves 8 V D bytes, beside 6,144 V D
FLOP: a tenth of the head's time on a GPU that computes 75 FLOP in the time of a byte. Fewer tokens make that share
larger, more tokens the chunk.
"""
IGNORED = -100
"""The label of a token that does not count, as everywhere in torch."""

Head = Callable[[Tensor], Tensor]
"""Logits of a hidden state, (1, n, D) -> (1, n, V), each token's from its own hidden state alone."""


def mean_cross_entropy(head: Head, parameters: Sequence[Tensor], hidden: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy in fp32 of the labels that are not `IGNORED`.

    Args:
        head: What makes logits of hidden states.
        parameters: Weights that `head` uses; those that need no gradient get none.
        hidden: Hidden states, (B, T, D).
        labels: The tokens that are expected, (B, T).
    """
    if labels.numel() <= CHUNK_TOKENS:
        logits = head(hidden).float()  # (B, T, V)
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    loss: Tensor = _in_chunks(head, parameters, hidden, labels)
    return loss


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives it no types
def _in_chunks(head: Head, parameters: Sequence[Tensor], hidden: Tensor, labels: Tensor) -> Tensor:
    """Return the loss by chunks; torch.compile leaves it as it is."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch gives it no types
        head, labels.flatten(), torch.is_grad_enabled(), hidden.flatten(0, 1), *trained
    )
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy whose gradients are there after its forward. N tokens, D hidden size."""

    @staticmethod
    def forward(ctx: Any, head: Head, labels: Tensor, training: bool, hidden: Tensor, *parameters: Tensor) -> Tensor:
        count = (labels != IGNORED).sum()
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        by_hidden = torch.empty_like(hidden) if training else None  # (N, D)
        by_parameters: list[Tensor | None] = [None] * len(parameters)
        for first, last in pairwise([*range(0, len(labels), CHUNK_TOKENS), len(labels)]):
            chunk = hidden[first:last].detach().unsqueeze(0).requires_grad_(training)  # (1, n, D)
            with torch.set_grad_enabled(training):
                logits = head(chunk).squeeze(0)  # (n, V)
            loss, by_logits = _loss_and_gradient(logits, labels[first:last], count)
            total += loss
            if by_hidden is not None:
                found = torch.autograd.grad(logits, (chunk, *parameters), by_logits, allow_unused=True)
                by_hidden[first:last] = found[0][0]
                by_parameters = [_added(sum_, new) for sum_, new in zip(by_parameters, found[1:], strict=True)]
                del found  # else it is alive beside that of the next chunk
            del logits, by_logits
        ctx.gradients = by_hidden, *by_parameters
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # handed on, not copied: they can be as large as the head
        if gradients is None:
            raise RuntimeError("the gradients of a loss in chunks can be asked for once")
        return None, None, None, *(None if own is None else own.mul_(gradient) for own in gradients)


def _loss_and_gradient(logits: Tensor, labels: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of losses, and the gradient of its `count`th part by the logits (n, V), in their dtype.

    The gradient is softmax less 1 at the label. It is made in the place of the logarithms, so that there is one fp32
    tensor where autograd would make three.
    """
    logarithms = functional.log_softmax(logits.detach(), dim=-1, dtype=torch.float32)  # (n, V)
    loss = functional.nll_loss(logarithms, labels, ignore_index=IGNORED, reduction="sum")
    by_logits = logarithms.exp_()
    counted = labels != IGNORED  # (n,)
    by_logits.scatter_add_(1, labels.where(counted, 0).unsqueeze(1), -torch.ones_like(by_logits[:, :1]))
    by_logits.mul_((counted / count).unsqueeze(1))
    return loss, by_logits.to(logits.dtype)


def _added(total: Tensor | None, new: Tensor | None) -> Tensor | None:
    if total is None or new is None:
        return new if total is None else total
    return total.add_(new)
