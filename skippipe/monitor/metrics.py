"""Every metric of a training step: its key, its unit, what it means and which module measures it, in this one table.

metrics.jsonl, the console, Weights & Biases and reports have a metric under its key.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Self

_LOOP = "skippipe.training.trainer"
_STEP = "skippipe.training.steps.step_metrics"
_UTILISATION = "skippipe.training.measurement.utilisation"
_MEMORY = "skippipe.training.measurement.memory_report"


class Metric(StrEnum):
    """A key of a step's metrics; docs/monitoring.md has this table too, held to it by a test."""

    unit: str
    meaning: str
    measured_in: str
    """The module whose code fills it in."""

    def __new__(cls, key: str, unit: str, meaning: str, measured_in: str) -> Self:
        """Make the member a string equal to its key."""
        member = str.__new__(cls, key)
        member._value_ = key
        member.unit, member.meaning, member.measured_in = unit, meaning, measured_in
        return member

    STEP = "step", "count", "optimizer steps so far, this one included", _STEP
    TOKENS = "tokens", "count", "tokens trained on so far", _STEP

    TRAIN_LOSS = "train/loss", "nats per token", "mean loss over all microbatches of the step", _STEP
    EARLY_EXIT_LOSS = (
        "train/early_exit_loss",
        "nats per token",
        "loss right behind the origin's layers; only with `recipe.early_exit_loss`",
        _STEP,
    )
    GRADIENT_NORM = "train/grad_norm", "none", "norm of all gradients before clipping", _STEP
    LEARNING_RATE = "train/lr", "none", "learning rate of the step", _STEP

    ITERATION_S = (
        "perf/iteration_s",
        "seconds",
        "wall-clock time of the step, with reduction, clipping and optimizer",
        _STEP,
    )
    TOKENS_PER_S = "perf/tokens_per_s", "tokens per second", "tokens of the step over its time", _STEP
    ELAPSED_S = "perf/elapsed_s", "seconds", "time of all steps so far, without validation and saving", _STEP
    TFLOP_PER_S = (
        "perf/tflop_per_s",
        "TFLOP per second",
        "model FLOP of all ranks together: layers on the routes and losses, forward and backward",
        _UTILISATION,
    )
    MFU = "perf/mfu", "share", "that rate over the devices' peak; only where the peak is known", _UTILISATION

    PLAN = "pipeline/plan", "name", "plan that the step followed: `main`, one of the recipe's, or `joining`", _STEP
    PREDICTED_S = "pipeline/predicted_s", "seconds", "iteration time that this plan predicts", _STEP
    BUBBLE_FRACTION = "pipeline/bubble_fraction", "share", "time in which the ranks did not compute, measured", _STEP

    NODES = "pipeline/nodes", "count", "processes that took part in the step", _STEP

    PEAK_BYTES = "memory/peak_bytes", "bytes", "highest memory of any rank so far", _MEMORY
    ESTIMATED_BYTES = "memory/estimated_bytes", "bytes", "memory that the plan estimates for that rank", _MEMORY

    BLOCKED_S = (
        "checkpoint/blocked_s",
        "seconds",
        "time for which the save before blocked training; only at the step after a save",
        _LOOP,
    )

    VALIDATION_LOSS = (
        "val/loss",
        "nats per token",
        "loss on held-out text at full depth; only at steps with a validation",
        _LOOP,
    )
    VALIDATION_PERPLEXITY = "val/perplexity", "none", "exponential of `val/loss`", _LOOP


StepMetrics = dict[Metric, Any]
"""One step: numbers, and the name of the plan."""

FORMER_KEYS = {"checkpoint/stopped_s": Metric.BLOCKED_S}
"""Keys in files of earlier versions."""


def with_current_keys(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of metrics.jsonl under the keys of today."""
    return {str(FORMER_KEYS.get(key, key)): value for key, value in entry.items()}
