"""The metrics of a step."""

from skippipe.model.architecture import experiment_model
from skippipe.model.cost import model_cost
from skippipe.model.device import torch_dtype
from skippipe.monitor.metrics import Metric, StepMetrics
from skippipe.training.measurement.utilisation import IterationFlop, utilisation
from skippipe.training.steps.step_totals import StepBegin, StepTotals
from skippipe.training.steps.training_state import TrainingState


class StepMeter:
    """Says of each step what it has come to and what it took."""

    def __init__(self, state: TrainingState, peak_tflop_per_s: float | None) -> None:
        """`peak_tflop_per_s` is the sum over all devices, None where it is not known."""
        self._state = state
        self._peak_tflop_per_s = peak_tflop_per_s
        experiment = state.experiment
        training, config = experiment.training, experiment_model(experiment)
        shape, dtype = (training.micro_batch_size, training.sequence_length), torch_dtype(training.dtype)
        cost = model_cost(config, *shape, dtype, lora=experiment.lora)
        self._flop = IterationFlop(cost, experiment.recipe, training.max_steps)

    def metrics(self, begun: StepBegin, totals: StepTotals, duration_s: float) -> StepMetrics:
        """Return the metrics of the step that is counted last."""
        state, plan = self._state, self._state.plans[begun.plan]
        world_size = state.context.world_size
        busy_s = sum(reading.busy_s for reading in totals.readings)
        has_exit = state.experiment.recipe.early_exit_loss > 0
        exits: StepMetrics = {Metric.EARLY_EXIT_LOSS: totals.exit_loss} if has_exit else {}
        return (
            {
                Metric.STEP: state.step,
                Metric.TRAIN_LOSS: totals.loss,
                Metric.GRADIENT_NORM: totals.grad_norm,
                Metric.LEARNING_RATE: begun.lr,
                Metric.ITERATION_S: duration_s,
                Metric.TOKENS_PER_S: state.tokens_per_step / duration_s,
                Metric.ELAPSED_S: state.elapsed_s,
                Metric.PLAN: begun.plan,
                Metric.PREDICTED_S: plan.predicted.iteration_s,
                Metric.BUBBLE_FRACTION: max(0.0, 1 - busy_s / (world_size * duration_s)),
                Metric.TOKENS: state.tokens,
                Metric.NODES: world_size,
            }
            | exits
            | utilisation(self._flop.of(plan, state.step - 1), duration_s, self._peak_tflop_per_s)
            | state.memory.metrics([reading.peak_bytes for reading in totals.readings])
        )
