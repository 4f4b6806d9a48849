"""Measures what tasks take where all ranks compute at once: the costs that a plan is made from."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from skippipe.config.experiment import Experiment
from skippipe.model.architecture import experiment_model
from skippipe.model.stage import build_stage
from skippipe.runtime.program.program import Opcode
from skippipe.runtime.stage_compute import StageCompute


class Tasks:
    """A stage of a few layers with embedding and head; every rank has the same."""

    def __init__(self, experiment: Experiment, layers: int) -> None:
        torch.set_num_threads(experiment.training.threads or 1)
        self._training = experiment.training
        self._config = experiment_model(experiment)
        stage = build_stage(
            self._config,
            0,
            layers,
            with_embedding_and_head=True,
            seed=0,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        self._compute = StageCompute(stage, torch.device("cpu"))

    def step(self) -> None:
        """Measure once, to warm up."""
        self.measure(1)

    def requests(self) -> dict[str, Callable[..., Any]]:
        """Return the measurement."""
        return {"measure": self.measure}

    def measure(self, repeats: int) -> dict[str, float]:
        """Return the median seconds of a forward, a loss and a backward."""
        taken: dict[Opcode, list[float]] = {Opcode.FORWARD: [], Opcode.LOSS: [], Opcode.BACKWARD: []}
        shape = self._training.micro_batch_size, self._training.sequence_length
        tokens = torch.zeros(shape, dtype=torch.int64)
        for _ in range(repeats):
            self._compute.load(0, tokens, tokens)
            flowing: Tensor | None = torch.randn(*shape, self._config.hidden_size)  # (B, T, D)
            for opcode, seconds in taken.items():
                begin_s = time.perf_counter()
                flowing = self._compute.run(opcode, 0, flowing)
                seconds.append(time.perf_counter() - begin_s)
        return {opcode.value: statistics.median(seconds) for opcode, seconds in taken.items()}


def make(experiment: Experiment, options: dict[str, Any]) -> Tasks:
    """Return this rank; options: the number of layers."""
    return Tasks(experiment, options["layers"])
