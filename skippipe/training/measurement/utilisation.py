"""Model FLOP of an iteration, and how much of the devices' peak that is (MFU)."""

from dataclasses import dataclass, field

from skippipe.config.recipe_options import RecipeOptions
from skippipe.model.cost import ModelCost
from skippipe.model.dropout.probability import expected_share
from skippipe.monitor.metrics import Metric, StepMetrics
from skippipe_scheduler.plan.plan import Plan


@dataclass(frozen=True)
class IterationFlop:
    """The FLOP of iterations, all ranks together, under a recipe that lasts for `max_steps` steps."""

    cost: ModelCost
    """Without activation checkpointing: what is computed again to save memory does not count as the model's work."""
    recipe: RecipeOptions = field(default_factory=RecipeOptions)
    max_steps: int = 1

    def of(self, plan: Plan, step: int = 0) -> float:
        """Return the FLOP of a step, counted from 0: the layers on every route, and every microbatch's losses.

        Of layers and FFN blocks that are left out by chance, it is the mean.
        """
        computed = sum(
            visits * sum(self._share(layer, step) for layer in range(*stage.layers))
            for stage, visits in zip(plan.stages, plan.visits, strict=True)
        )
        losses = len(plan.microbatches) * self.recipe.num_losses
        layer_flop = self.cost.layer_forward_flop * (1 + self.cost.backward_to_forward)
        return computed * layer_flop + losses * self.cost.loss_flop

    def _share(self, layer: int, step: int) -> float:
        return expected_share(
            self.recipe,
            layer=layer,
            num_layers=self.cost.num_layers,
            step=step,
            max_steps=self.max_steps,
            ffn_share=self.cost.ffn_share,
        )


def utilisation(flop: float, duration_s: float, peak_tflop_per_s: float | None) -> StepMetrics:
    """Return the rate at which an iteration ran, and its share of all devices' peak where that is known."""
    rate = flop / duration_s / 1e12
    metrics: StepMetrics = {Metric.TFLOP_PER_S: rate}
    if peak_tflop_per_s is not None:
        metrics[Metric.MFU] = rate / peak_tflop_per_s
    return metrics
