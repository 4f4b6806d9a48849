"""Gradient reduction over the replicas of a stage: one sum at its place in the program, also with no microbatch."""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 64 * 2**20
"""Gradients travel in buckets of about this size, so that their flat copy stays small."""


def reduce_gradients(
    parameters: Iterable[nn.Parameter], all_reduce: Callable[[Tensor], None] | None, factor: float = 1.0
) -> None:
    """Sum `.grad` over the replicas (`all_reduce`, in place, on the CPU; None without replicas), then scale it.

    A parameter without gradient takes part with zeros, so that all replicas' messages have the same size.
    """
    held = list(parameters)
    for parameter in held:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in held if parameter.grad is not None]
    if all_reduce is not None:
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket]).cpu()
            all_reduce(flat)
            pieces = torch.split(flat, [gradient.numel() for gradient in bucket])
            for gradient, piece in zip(bucket, pieces, strict=True):
                gradient.copy_(piece.view_as(gradient))
    if factor != 1.0:
        for gradient in gradients:
            gradient.mul_(factor)


def all_reduce_in(flat: Tensor, dtype: torch.dtype, group: dist.ProcessGroup | None) -> None:
    """Sum `flat` (n,) over the R ranks of `group` in place: numbers travel in `dtype`, sums are made in fp32.

    Every rank adds up 1/R of the numbers and sends its sums to all, so each travels twice, as in a ring, and all ranks
    end with the same sums.
    """
    count = dist.get_world_size(group)
    rows = torch.zeros(count, -(-flat.numel() // count), dtype=dtype)  # (R, n / R)
    rows.view(-1)[: flat.numel()] = flat
    received = torch.empty_like(rows)
    dist.all_to_all_single(received.view(torch.uint8), rows.view(torch.uint8), group=group)
    sums = received.float().sum(0).to(dtype)  # (R, n / R) -> (n / R,)
    dist.all_gather_into_tensor(rows.view(-1).view(torch.uint8), sums.view(torch.uint8), group=group)
    flat.copy_(rows.view(-1)[: flat.numel()])


def visit_factor(normalization: str, num_microbatches: int, visits: int) -> float:
    """Return what a stage's gradient is multiplied by: 1, or num_microbatches / visits for "visits"."""
    return num_microbatches / visits if normalization == "visits" and visits else 1.0


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size_bytes = 0
    for gradient in gradients:
        bucket.append(gradient)
        size_bytes += gradient.nbytes
        if size_bytes >= BUCKET_BYTES:
            yield bucket
            bucket, size_bytes = [], 0
    if bucket:
        yield bucket
