"""Where a step's metrics go on rank 0: metrics.jsonl, nodes.json, the console, W&B. Other ranks report nothing."""

import logging
from collections.abc import Sequence
from typing import Protocol

from skippipe.config.experiment import Experiment
from skippipe.errors import StorageError
from skippipe.monitor.console import Console
from skippipe.monitor.live.node_board import NodeBoard
from skippipe.monitor.live.status_sink import StatusSink
from skippipe.monitor.metrics import Metric, StepMetrics
from skippipe.monitor.metrics_file import MetricsWriter
from skippipe.monitor.wandb_run import WandbRun

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes a step's metrics."""

    def write(self, metrics: StepMetrics) -> None:
        """Take one step."""

    def close(self) -> None:
        """Let go of files and connections."""


class Reporter:
    """Hands each step to all sinks. Storage that fails is said, tried again at every step, and does not end the run."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = list(sinks)
        self._failing: set[int] = set()

    def write(self, metrics: StepMetrics) -> None:
        """Report one step."""
        for index, sink in enumerate(self._sinks):
            try:
                sink.write(metrics)
            except StorageError as reason:
                if index not in self._failing:
                    logger.warning("step %d: %s; it is tried again at every step", metrics[Metric.STEP], reason)
                self._failing.add(index)
            else:
                if index in self._failing:
                    logger.info("step %d: metrics can be written again", metrics[Metric.STEP])
                self._failing.discard(index)

    def close(self) -> None:
        """Close all sinks."""
        for sink in self._sinks:
            try:
                sink.close()
            except StorageError as reason:
                logger.warning("%s; the steps since then are lost", reason)


def open_reporter(
    experiment: Experiment, first_step: int, run_id: str | None, board: NodeBoard, *, whole: bool = True
) -> Reporter:
    """Return the reporter of rank 0; steps after `first_step` of an earlier try leave metrics.jsonl.

    `run_id` is that of the W&B run, None without one. `board` knows of each step what the nodes did, before it is
    reported. Unless `whole`, steps before may lie on another disk. A further place for metrics is a further entry of
    the list.
    """
    run_dir = experiment.run_path
    sinks: list[Sink] = [
        MetricsWriter(
            run_dir / "metrics.jsonl", first_step, continued=whole and experiment.checkpoint.resume == "auto"
        ),
        Console(first_step, experiment.training.max_steps, experiment.logging.interval),
        StatusSink(run_dir, experiment.training.max_steps, board),
    ]
    if run_id is not None:
        wandb_run = WandbRun(experiment, run_dir, run_id, board.metrics)
        wandb_run.log_plan(run_dir / "plan.json")
        sinks.append(wandb_run)
    return Reporter(sinks)
