"""Iterations of a plan without the loop around them, and the same tasks alone: no transport, no program."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skippipe.config.experiment import Experiment
from skippipe.data.samples import SampleOrder
from skippipe.data.token_cache import open_cache
from skippipe.model.architecture import experiment_model
from skippipe.runtime.distributed_runner import DistributedRunner
from skippipe.runtime.program.program import Opcode, compile_programs
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.runner_factory import make_runner
from skippipe.runtime.stage_compute import StageCompute
from skippipe_scheduler.plan.validate import load_plan


class Bare:
    """One rank of a plan, without optimizer."""

    def __init__(self, experiment: Experiment, plan_path: Path) -> None:
        context = DistributedContext.from_environment(experiment.comm.timeout_s)
        self._experiment, self._plan = experiment, load_plan(plan_path)
        training = experiment.training
        cache = open_cache(experiment.data, experiment.seed)
        self._order = SampleOrder(cache, seed=experiment.seed, sequence_length=training.sequence_length)
        config = experiment_model(experiment)
        runner = make_runner(experiment, self._plan, config, context)
        if not isinstance(runner, DistributedRunner):
            raise ValueError("a plan needs more than one rank")
        self._runner = runner
        self._shape = training.micro_batch_size, training.sequence_length, config.hidden_size
        program = compile_programs(self._plan, 1)[context.rank]  # the sizes of transfers do not matter here
        self._tasks = program.select(Opcode.FORWARD, Opcode.LOSS, Opcode.BACKWARD)
        self._alone = StageCompute(runner.stages[runner.stage_index], torch.device("cpu"))

    def step(self) -> float:
        """Run one iteration."""
        return self._runner.train_iteration(self._batch, _nothing).loss

    def requests(self) -> dict[str, Callable[..., Any]]:
        """Return the measurements."""
        return {"durations": self.durations, "busy": self.busy, "alone": self.alone}

    def durations(self, count: int) -> list[float]:
        """Return the seconds of `count` iterations."""
        return [self._runner.train_iteration(self._batch, _nothing).duration_s for _ in range(count)]

    def busy(self) -> dict[str, float]:
        """Run one iteration; return the seconds of its tasks, between tasks, and of the threads that move messages.

        Waits for messages are left out. The last is processor time.
        """
        processor_s, main_s = time.process_time(), time.thread_time()
        result = self._runner.train_iteration(self._batch, _nothing)
        threads_s = time.process_time() - processor_s - (time.thread_time() - main_s)
        waited_s = sum(wait.end_s - wait.start_s for wait in result.transfers)
        tasks_s = result.busy_s
        return {"tasks_s": tasks_s, "between_s": result.duration_s - waited_s - tasks_s, "threads_s": threads_s}

    def alone(self) -> dict[str, float]:
        """Run the tasks in the program's order on made-up tensors; return their seconds, and the shortest."""
        stage = self._runner.stages[self._runner.stage_index]
        stage.zero_grad(set_to_none=True)
        self._alone.reset(len(self._plan.microbatches))
        for task in self._tasks:
            if task.opcode is Opcode.LOSS:
                self._alone.load(task.microbatch, *self._batch(task.microbatch))
        made_up = torch.randn(self._shape) * 1e-3  # (B, T, D)
        seconds = []
        for task in self._tasks:
            begins = task.opcode is Opcode.FORWARD and task.hop == 0
            received: Tensor | None = None if begins else made_up
            begin_s = time.perf_counter()
            self._alone.run(task.opcode, task.microbatch, received)
            seconds.append(time.perf_counter() - begin_s)
        return {"tasks_s": sum(seconds), "shortest_s": min(seconds)}

    def _batch(self, microbatch: int) -> tuple[Tensor, Tensor]:
        training = self._experiment.training
        return self._order.batch(0, microbatch, training.num_microbatches, training.micro_batch_size)


def _nothing() -> None:
    """Stand for the optimizer."""


def make(experiment: Experiment, options: dict[str, Any]) -> Bare:
    """Return this rank; options: the plan file and sections of the experiment to replace."""
    torch.set_num_threads(experiment.training.threads or 1)
    return Bare(Experiment.model_validate(experiment.model_dump() | options.get("sections", {})), Path(options["plan"]))
