"""Model FLOP of an iteration, and how much of the devices' peak that is (MFU)."""

from dataclasses import dataclass

from skippipe.model.cost import ModelCost
from skippipe.monitor.metrics import Metric, StepMetrics
from skippipe_scheduler.plan.plan import Plan

BACKWARD_AND_FORWARD = 3
"""A backward is two forwards; what is computed again to save memory does not count as the model's work."""


@dataclass(frozen=True)
class Utilisation:
    """`flop` of one iteration, all ranks together; `peak_tflop_per_s` of all devices, None where unknown."""

    flop: float
    peak_tflop_per_s: float | None

    def metrics(self, iteration_s: float) -> StepMetrics:
        """Return the rate at which an iteration of this duration ran, and its share of the peak where that is known."""
        rate = self.flop / iteration_s / 1e12
        metrics: StepMetrics = {Metric.TFLOP_PER_S: rate}
        if self.peak_tflop_per_s is not None:
            metrics[Metric.MFU] = rate / self.peak_tflop_per_s
        return metrics


def iteration_flop(plan: Plan, cost: ModelCost, num_losses: int = 1) -> float:
    """Return the FLOP of one iteration: the layers on every microbatch's route, and every microbatch's losses."""
    layers = plan.layers_per_stage
    visited = sum(layers[plan.stage_of[node]] for microbatch in plan.microbatches for node in microbatch.route)
    return (
        visited * cost.layer_forward_flop * BACKWARD_AND_FORWARD + len(plan.microbatches) * num_losses * cost.loss_flop
    )
