"""What rank 0 shows of a run: a table at the start, a line a step, a bar where there is a terminal."""

import sys
from typing import NamedTuple

from tqdm import tqdm

from skippipe.monitor.metrics import Metric, StepMetrics
from skippipe.monitor.terminal import columns, fitting, say
from skippipe.runtime.plans.plan_set import MAIN_PLAN
from skippipe_scheduler.plan.plan import Plan


class Console:
    """Prints every `interval` steps on standard output; the bar is on standard error, and has the throughput."""

    def __init__(self, first_step: int, max_steps: int, interval: int) -> None:
        self._max_steps = max_steps
        self._interval = interval
        self._bar = tqdm(
            initial=first_step,
            total=max_steps,
            unit="step",
            leave=False,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
            file=sys.stderr,
        )

    def write(self, metrics: StepMetrics) -> None:
        """Show one step."""
        step = int(metrics[Metric.STEP])
        if step % self._interval == 0 or step == self._max_steps or Metric.VALIDATION_LOSS in metrics:
            say(step_line(metrics, self._max_steps, columns(sys.stdout)))
        self._bar.set_postfix_str(", ".join(_speed(metrics)), refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


def step_line(metrics: StepMetrics, max_steps: int, width: int | None = None) -> str:
    """Return one step's metrics as a line; of `width` characters at most, with what matters most."""
    step = f"step {metrics[Metric.STEP]:.0f}/{max_steps}"
    validation = [f"validation loss {metrics[Metric.VALIDATION_LOSS]:.4f}"] if Metric.VALIDATION_LOSS in metrics else []
    parts = (
        f"{step:<{len(f'step {max_steps}/{max_steps}')}}",
        f"loss {metrics[Metric.TRAIN_LOSS]:.4f}",
        *validation,
        f"{metrics[Metric.ITERATION_S]:.3f} s ({_plan(metrics)} {metrics[Metric.PREDICTED_S]:.3f})",
        f"grad norm {metrics[Metric.GRADIENT_NORM]:#.3g}",
        f"lr {metrics[Metric.LEARNING_RATE]:.1e}",
        *_speed(metrics),
    )
    return fitting(parts, width)


def _speed(metrics: StepMetrics) -> list[str]:
    """Return the throughput, and the share of the devices' peak where that is known."""
    mfu = [f"MFU {metrics[Metric.MFU]:.1%}"] if Metric.MFU in metrics else []
    return [f"{metrics[Metric.TOKENS_PER_S]:,.0f} tokens/s", *mfu]


def _plan(metrics: StepMetrics) -> str:
    """Return how a line calls the plan of its step: by name where it is not the main one."""
    name = metrics.get(Metric.PLAN, MAIN_PLAN)
    return "plan" if name == MAIN_PLAN else f"plan {name}"


def further_line(name: str, plan: Plan) -> str:
    """Return a line about a plan beside the main one."""
    return (
        f"plan {name}: {plan.rules.describe_lengths()} of {len(plan.stages)} stages, predicted iteration "
        f"{plan.predicted.iteration_s:.3f} s, {plan.hash}"
    )


class ParameterCounts(NamedTuple):
    """Parameters of a model, and how many of them are trained."""

    total: int
    trained: int

    def __str__(self) -> str:
        frozen = "" if self.trained == self.total else f" ({self.trained:,} trained)"
        return f"{self.total:,} parameters{frozen}"


def start_table(plan: Plan, counts: ParameterCounts, world_size: int) -> str:
    """Return what is about to run: stages with layers, nodes and visits, and the predicted iteration."""
    processes = "one process" if world_size == 1 else f"{world_size} processes"
    lines = [
        f"{counts}, {len(plan.microbatches)} microbatches over {plan.rules.describe_lengths()} of "
        f"{len(plan.stages)} stages, {processes}, plan {plan.hash}",
        f"{'stage':>5}  {'layers':9}{'visits':>7}  nodes",
    ]
    for index, stage in enumerate(plan.stages):
        layers = f"{stage.layers[0]}-{stage.layers[1] - 1}"
        lines.append(f"{index:>5}  {layers:9}{plan.visits[index]:>7}  {', '.join(stage.nodes) or 'nobody'}")
    predicted = plan.predicted
    lines.append(f"predicted iteration {predicted.iteration_s:.3f} s (no plan below {predicted.lower_bound_s:.3f} s)")
    return "\n".join(lines)
