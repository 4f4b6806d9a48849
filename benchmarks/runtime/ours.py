"""Ours as a contender: the project's own training loop, records included, along a plan."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from skippipe.config.experiment import Experiment
from skippipe.monitor.metrics import Metric
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.training.loop import open_trainer
from skippipe.training.signals import StopSignal
from skippipe_scheduler.plan.validate import load_plan


class Ours:
    """One rank of a training run."""

    def __init__(self, experiment: Experiment, plan_path: Path) -> None:
        context = DistributedContext.from_environment(experiment.comm.timeout_s)
        self._open = open_trainer(experiment, load_plan(plan_path), context)
        self._trainer = self._open.__enter__()
        self._stop = StopSignal()

    def step(self) -> float:
        """Run one step as `Trainer.run` does."""
        metrics = self._trainer.one_step(self._stop).metrics
        self._trainer.records.write(metrics)
        return float(metrics[Metric.TRAIN_LOSS])

    def requests(self) -> dict[str, Callable[..., Any]]:
        """Return nothing: steps are all it does."""
        return {}


def make(experiment: Experiment, options: dict[str, Any]) -> Ours:
    """Return this rank; options: the plan file and the run directory."""
    torch.set_num_threads(experiment.training.threads or 1)
    own = experiment.model_copy(update={"run_dir": options["run_dir"]} | options.get("sections", {}))
    return Ours(own, Path(options["plan"]))
