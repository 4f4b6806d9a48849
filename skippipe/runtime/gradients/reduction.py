"""Gradient reduction over the replicas of a stage: one sum at its place in the program, also with no microbatch.

Gradients are summed in buckets, of which several are on their way at a time: while one travels, the next is copied
together and the one before is copied back.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from skippipe.runtime.gradients.collectives import DirectReduceScatterAllGather, Posted
from skippipe.runtime.ranks.whole_messages import Waitable

BUCKET_BYTES = 4 * 2**20
"""Gradients travel in buckets of about this size, so that their flat copies stay small."""
BUCKETS_IN_FLIGHT = 3
"""Buckets of which a sum may have begun and not ended."""


@dataclass(frozen=True)
class Bucket:
    """Gradients that travel together: flat (n,) on the CPU, and how they were shaped. `number` counts from 0."""

    number: int
    flat: Tensor
    shapes: tuple[torch.Size, ...]
    is_last: bool


class BucketSum(Protocol):
    """Sums buckets over the replicas."""

    def expect(self, sizes: Sequence[int]) -> None:
        """Get ready for buckets 0, 1, ... of so many numbers; all replicas do so before the first of them is summed."""

    def __call__(self, bucket: Bucket) -> Iterator[Waitable]:
        """Sum `bucket.flat` in place, as a generator: it yields a communication that has begun.

        The caller resumes it when that one has ended; the sum is there when the generator is exhausted. All replicas
        begin their communication in the same order.
        """


def fill_missing(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return all gradients; a parameter without one gets zeros, so that all replicas' messages have the same size."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    return gradients


def scale(gradients: Iterable[Tensor], factor: float) -> None:
    """Multiply gradients in place."""
    if factor != 1.0:
        for gradient in gradients:
            gradient.mul_(factor)


def expect_sums(parameters: Iterable[Tensor], bucket_sum: BucketSum, bucket_bytes: int = BUCKET_BYTES) -> None:
    """Get ready for the first buckets of an iteration, as many as will be on their way at a time."""
    buckets = islice(_buckets(parameters, bucket_bytes), BUCKETS_IN_FLIGHT)
    bucket_sum.expect([sum(gradient.numel() for gradient in bucket) for bucket in buckets])


def all_reduce_over_replicas(
    gradients: Sequence[Tensor],
    bucket_sum: BucketSum,
    bucket_bytes: int = BUCKET_BYTES,
    in_flight: int = BUCKETS_IN_FLIGHT,
) -> None:
    """Sum gradients over the replicas in place, bucket after bucket, `in_flight` of them at a time."""
    begun: deque[tuple[Iterator[Waitable], Waitable]] = deque()

    def resume(reduction: Iterator[Waitable]) -> None:
        work = next(reduction, None)
        if work is not None:
            begun.append((reduction, work))

    def finish_oldest() -> None:
        reduction, work = begun.popleft()
        work.wait()
        resume(reduction)

    buckets = list(_buckets(gradients, bucket_bytes))
    for number, bucket in enumerate(buckets):
        while len(begun) >= in_flight:
            finish_oldest()
        resume(_summed(bucket, number, number == len(buckets) - 1, bucket_sum))
    while begun:
        finish_oldest()


class BucketExchange(Protocol):
    """One all-reduce, whose receives are posted."""

    rows: Tensor
    """Zeros at first, then this rank's numbers, and at last their sums; there may be more room than numbers."""

    def run(self) -> Iterator[Waitable]:
        """Begin one part after the other; each is resumed when it has ended."""


class ExactSum:
    """A sum of numbers by exchanges; `make` posts the receives of the one of a bucket's number and size."""

    def __init__(self, make: Callable[[int, int], BucketExchange]) -> None:
        self._exchanges = Posted(make)

    def expect(self, sizes: Sequence[int]) -> None:
        """Post the receives."""
        self._exchanges.post(sizes)

    def __call__(self, bucket: Bucket) -> Iterator[Waitable]:
        """See `BucketSum`."""
        flat = bucket.flat
        exchange = self._exchanges.take(bucket.number, flat.numel())
        numbers = exchange.rows.view(-1)[: flat.numel()]
        numbers.copy_(flat)
        yield from exchange.run()
        flat.copy_(numbers)


class DirectAllReduce(ExactSum):
    """The sum of numbers that travel in `dtype`; it is made in fp32.

    A direct all-reduce: each of the R ranks adds up 1/R of the numbers, in the order of ranks (reduce-scatter), and
    sends its sums to all (all-gather). Each number travels twice, as in a ring, and all ranks end with the same sums.
    But the messages of either half leave at once, so that slow links cost two latencies instead of 2 (R - 1).
    """

    def __init__(self, group: dist.ProcessGroup, dtype: torch.dtype = torch.float32) -> None:
        count = group.size()
        super().__init__(lambda number, size: _DirectExchange(-(-size // count), dtype, group, number))


class _DirectExchange(DirectReduceScatterAllGather):
    def run(self) -> Iterator[Waitable]:
        yield self.scatter()
        yield self.gather(self.received.float().sum(0).to(self.rows.dtype))  # (R, n / R) -> (n / R,)


def visit_factor(normalization: str, num_microbatches: int, visits: int) -> float:
    """Return what a stage's gradient is multiplied by: 1, or num_microbatches / visits for "visits"."""
    return num_microbatches / visits if normalization == "visits" and visits else 1.0


def _summed(gradients: Sequence[Tensor], number: int, is_last: bool, bucket_sum: BucketSum) -> Iterator[Waitable]:
    """Copy a bucket together, sum it, copy it back."""
    flat = torch.cat([gradient.flatten() for gradient in gradients]).cpu()
    yield from bucket_sum(Bucket(number, flat, tuple(gradient.shape for gradient in gradients), is_last))
    pieces = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))


def _buckets(gradients: Iterable[Tensor], bucket_bytes: int) -> Iterator[list[Tensor]]:
    """Put gradients together, or parameters, which have the same sizes."""
    bucket: list[Tensor] = []
    size_bytes = 0
    for gradient in gradients:
        bucket.append(gradient)
        size_bytes += gradient.nbytes
        if size_bytes >= bucket_bytes:
            yield bucket
            bucket, size_bytes = [], 0
    if bucket:
        yield bucket
