"""Lossy sums of gradients over the replicas of a stage. What a sum leaves out is added to the next: error feedback.

That memory belongs to one rank, one plan and one run of the process: it is not part of a checkpoint, so a resumed run
loses the rounding errors of one step.
"""

import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from skippipe.config.experiment import PowerSgdOptions
from skippipe.runtime.gradients.collectives import DirectReduceScatterAllGather, Posted
from skippipe.runtime.gradients.hierarchical import HierarchicalAllReduce
from skippipe.runtime.gradients.reduction import Bucket, BucketSum, DirectAllReduce
from skippipe.runtime.ranks.whole_messages import Waitable
from skippipe.runtime.runner_options import RunnerOptions
from skippipe.runtime.transport.int8 import decode, encode, int8_bytes

BLOCK = 1024
"""Numbers of a gradient that share a scale."""
MIN_COMPRESSION_RATE = 2
"""PowerSGD leaves a matrix alone where it would not shrink by more than this."""


def make_bucket_sum(group: dist.ProcessGroup, options: RunnerOptions, regions: Sequence[Sequence[int]]) -> BucketSum:
    """Return the sum of buckets that the options ask for; `regions` are ranks of the group that are near each other."""
    dtype = options.gradient_dtype or options.dtype
    if options.gradient_compression == "int8":
        return Int8Sum(group, error_feedback=options.error_feedback)
    if options.gradient_compression == "powersgd":
        return PowerSgdSum(group, options.powersgd, error_feedback=options.error_feedback)
    if options.sums_by_region and len(regions) > 1:
        return HierarchicalAllReduce(group, regions, dtype)
    return DirectAllReduce(group, dtype)


class Int8Sum:
    """The sum of gradients that travel as int8 with a scale for each block; it is made in fp32.

    Each of the R ranks adds up 1/R of the numbers and sends its sums to all, so each number travels twice. Both
    roundings are remembered where they happen: that of its own gradients by every rank, that of sums by their rank.
    """

    def __init__(self, group: dist.ProcessGroup, *, error_feedback: bool) -> None:
        self._count = group.size()
        self._error_feedback = error_feedback
        self._exchanges = Posted(
            lambda number, size: DirectReduceScatterAllGather(
                int8_bytes(self._width(size), BLOCK), torch.uint8, group, number
            )
        )
        self._own_errors: dict[int, Tensor] = {}
        self._sum_errors: dict[int, Tensor] = {}

    def expect(self, sizes: Sequence[int]) -> None:
        """Post the receives."""
        self._exchanges.post(sizes)

    def __call__(self, bucket: Bucket) -> Iterator[Waitable]:
        """See `BucketSum`."""
        flat = bucket.flat
        rows = torch.zeros(self._count, self._width(flat.numel()))  # (R, n / R)
        rows.view(-1)[: flat.numel()] = flat
        exchange = self._exchanges.take(bucket.number, flat.numel())
        exchange.rows.copy_(self._rounded(rows, bucket.number, self._own_errors))
        yield exchange.scatter()
        sums = decode(exchange.received, BLOCK).sum(0, keepdim=True)  # (1, n / R)
        yield exchange.gather(self._rounded(sums, bucket.number, self._sum_errors)[0])
        flat.copy_(decode(exchange.rows, BLOCK).view(-1)[: flat.numel()])

    def _width(self, size: int) -> int:
        return math.ceil(size / self._count / BLOCK) * BLOCK

    def _rounded(self, rows: Tensor, number: int, errors: dict[int, Tensor]) -> Tensor:
        """Return the messages of rows (R, n) after adding what the last ones left out."""
        if number in errors:
            rows += errors[number]
        messages = encode(rows, BLOCK)
        if self._error_feedback:
            errors[number] = (rows - decode(messages, BLOCK)).nan_to_num_(0.0, 0.0, 0.0)
        return messages


@dataclass(frozen=True)
class _GradBucket:
    """A bucket in the form that torch's communication hooks take."""

    flat: Tensor
    bucket: Bucket

    def index(self) -> int:
        return self.bucket.number

    def is_last(self) -> bool:
        return self.bucket.is_last

    def buffer(self) -> Tensor:
        return self.flat

    def gradients(self) -> list[Tensor]:
        pieces = torch.split(self.flat, [shape.numel() for shape in self.bucket.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.bucket.shapes, strict=True)]


class _BorrowedGroup:
    """A process group for functions that are not to keep it alive."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = weakref.ref(group)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group(), name)


class PowerSgdSum:
    """Torch's PowerSGD (Vogels et al. 2019): matrices travel as two factors of a few columns, in fp32.

    The first sums are exact. Torch continues a sum in gloo's threads, so one bucket follows another. Those threads may
    still hold what they were to call when the sum is there. If they let go of the group last, it would wait in one of
    its own threads for that thread to end, and the process would abort; so they only borrow it.
    """

    def __init__(self, group: dist.ProcessGroup, options: PowerSgdOptions, *, error_feedback: bool) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

        self._group = group
        self._state = PowerSGDState(
            _BorrowedGroup(group),
            matrix_approximation_rank=options.rank,
            start_powerSGD_iter=options.start_iteration,
            min_compression_rate=MIN_COMPRESSION_RATE,
            use_error_feedback=error_feedback,
            orthogonalization_epsilon=1e-8,
        )

    def expect(self, sizes: Sequence[int]) -> None:
        """Do nothing: torch posts its own receives."""

    def __call__(self, bucket: Bucket) -> Iterator[Waitable]:
        """See `BucketSum`."""
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import powerSGD_hook

        flat = bucket.flat.float()
        grad_bucket = _GradBucket(flat, bucket)
        powerSGD_hook(self._state, grad_bucket).wait()
        if not all(gradient.any() for gradient in grad_bucket.gradients()):
            # A matrix without gradient leaves factors of zeros, from which the next iteration could not start.
            self._state.p_memory_dict.pop(bucket.number, None)
        bucket.flat.copy_(flat.mul_(self._group.size()))  # torch makes means
        yield from ()


def int8_gradient_bytes(parameters: int) -> int:
    """Return the bytes that stand for the gradients of so many parameters."""
    return int8_bytes(math.ceil(parameters / BLOCK) * BLOCK, BLOCK)


def powersgd_gradient_bytes(shapes: Iterable[Iterable[int]], rank: int) -> int:
    """Return the bytes that stand for gradients of these shapes, once PowerSGD has begun."""
    return 4 * sum(_powersgd_numbers(tuple(shape), rank) for shape in shapes)


def _powersgd_numbers(shape: tuple[int, ...], rank: int) -> int:
    rows, columns = shape[0], math.prod(shape[1:])
    factors = (rows + columns) * min(rows, columns, rank)
    return factors if factors * MIN_COMPRESSION_RATE < rows * columns else rows * columns
