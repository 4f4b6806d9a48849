"""REDUCE on one rank: the gradients of its stage, summed over the stage's replicas and scaled."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from skippipe.runtime.gradients.compression import make_bucket_sum
from skippipe.runtime.gradients.reduction import all_reduce_over_replicas, expect_sums, fill_missing, scale
from skippipe.runtime.ranks.groups import ProcessGroups
from skippipe.runtime.ranks.torch_errors import translating_errors
from skippipe.runtime.runner_options import RunnerOptions

Result = TypeVar("Result")


class StageReduction:
    """Sums in fp32, by the options' compression, or leaves the sum to the optimizer (`by_optimizer`)."""

    def __init__(self, stage_index: int, groups: ProcessGroups, options: RunnerOptions) -> None:
        self.replicas = groups.replicas
        """The group of this stage's replicas; None where there is one."""
        self.by_optimizer: Callable[[float], None] | None = None
        """Sums what is in `.grad` over the replicas and scales it."""
        self._others = tuple(rank for rank in groups.replica_ranks if rank != groups.rank)
        self._stage_index = stage_index
        self._bucket_sum = (
            None if groups.replicas is None else make_bucket_sum(groups.replicas, options, groups.regions)
        )

    def expect(self, parameters: Iterable[nn.Parameter]) -> None:
        """Post the receives of the iteration's first sums."""
        bucket_sum = self._bucket_sum
        if bucket_sum is not None and self.by_optimizer is None:
            self.with_replicas(lambda: expect_sums(parameters, bucket_sum))  # fails at once where one is lost

    def with_replicas(self, call: Callable[[], Result]) -> Result:
        """Call something that waits for the other replicas; see `Runner`."""
        return translating_errors(f"waited for the other replicas of stage {self._stage_index}", self._others, call)

    def run(self, parameters: Iterable[nn.Parameter], factor: float) -> None:
        """Sum gradients over the replicas in place and multiply them by `factor`; a missing one counts as zeros."""
        gradients = fill_missing(parameters)

        def reduce() -> None:
            if self.by_optimizer is not None:
                self.by_optimizer(factor)
                return
            if self._bucket_sum is not None:
                all_reduce_over_replicas(gradients, self._bucket_sum)
            scale(gradients, factor)

        self.with_replicas(reduce)

    def latest_ns(self, time_ns: int) -> int:
        """Return the latest of the times that the replicas give."""
        if self.replicas is None:
            return time_ns
        latest = torch.tensor([time_ns])
        self.with_replicas(lambda: dist.all_reduce(latest, op=dist.ReduceOp.MAX, group=self.replicas))
        return int(latest)
