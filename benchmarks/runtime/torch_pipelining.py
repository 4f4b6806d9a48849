"""torch.distributed.pipelining as a contender: one pipeline over all ranks, in any of its schedules."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from parts import Batches, loss_of, make_optimizer, make_parts
from torch.distributed import pipelining
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from skippipe.config.experiment import Experiment


class TorchPipelining:
    """One rank of one pipeline."""

    def __init__(self, experiment: Experiment, schedule: str) -> None:
        dist.init_process_group("gloo")
        rank, world_size = dist.get_rank(), dist.get_world_size()
        kind = get_schedule_class(schedule)
        several = issubclass(kind, PipelineScheduleMulti)
        count = 2 * world_size if several else world_size
        own = _own_parts(schedule, rank, world_size) if several else [rank]
        parts = list(make_parts(experiment, count))
        stages = [pipelining.PipelineStage(parts[index], index, count, torch.device("cpu")) for index in own]
        self._first, self._last = 0 in own, count - 1 in own
        self._schedule = kind(stages if several else stages[0], experiment.training.num_microbatches, loss_fn=loss_of)
        self._optimizer = make_optimizer(
            experiment, (parameter for index in own for parameter in parts[index].parameters())
        )
        self._batches = Batches(experiment)
        self._step = 0

    def step(self) -> float | None:
        """Run one step; the last part's rank knows the loss."""
        self._optimizer.zero_grad(set_to_none=True)
        batch = self._batches.of_step(self._step) if self._first or self._last else []
        arguments = [torch.cat([input_ids for input_ids, _ in batch])] if self._first else []
        target = torch.cat([labels for _, labels in batch]) if self._last else None
        losses: list[torch.Tensor] = []
        self._schedule.step(*arguments, target=target, losses=losses, return_outputs=False)
        self._optimizer.step()
        self._step += 1
        return float(torch.stack(losses).mean()) if self._last else None

    def requests(self) -> dict[str, Callable[..., Any]]:
        """Return nothing: steps are all it does."""
        return {}


def _own_parts(schedule: str, rank: int, world_size: int) -> list[int]:
    """Return the two parts of a rank: in a V the second ones go backwards, else they begin again at rank 0."""
    if "ZBV" in schedule:
        return [rank, 2 * world_size - 1 - rank]
    return [rank, rank + world_size]


def make(experiment: Experiment, options: dict[str, Any]) -> TorchPipelining:
    """Return this rank; options: the name of the schedule."""
    return TorchPipelining(experiment, options["schedule"])
