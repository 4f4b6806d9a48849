"""What rank 0 shows of a run: a table at the start, a line a step, a bar where there is a terminal."""

import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from skippipe_scheduler.plan.plan import Plan


class Console:
    """Prints every `interval` steps on standard output; the bar is on standard error."""

    def __init__(self, first_step: int, max_steps: int, interval: int) -> None:
        self._max_steps = max_steps
        self._interval = interval
        self._bar = tqdm(
            initial=first_step,
            total=max_steps,
            unit="step",
            leave=False,
            disable=not sys.stderr.isatty(),
            file=sys.stderr,
        )

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Show one step."""
        step = int(metrics["step"])
        if step % self._interval == 0 or step == self._max_steps or "val/loss" in metrics:
            tqdm.write(step_line(metrics, self._max_steps), file=sys.stdout)
            sys.stdout.flush()
        self._bar.update()

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


def step_line(metrics: Mapping[str, Any], max_steps: int) -> str:
    """Return one step's metrics as a line."""
    line = (
        f"step {metrics['step']:.0f}/{max_steps}  loss {metrics['train/loss']:.4f}  "
        f"grad norm {metrics['train/grad_norm']:.3f}  lr {metrics['train/lr']:.2e}  "
        f"{metrics['perf/iteration_s']:.3f} s ({_plan(metrics)} {metrics['pipeline/predicted_s']:.3f} s)  "
        f"{metrics['perf/tokens_per_s']:,.0f} tokens/s"
    )
    if "perf/mfu" in metrics:
        line += f"  MFU {metrics['perf/mfu']:.1%}"
    if "val/loss" in metrics:
        line += f"  validation loss {metrics['val/loss']:.4f}"
    return line


def _plan(metrics: Mapping[str, Any]) -> str:
    """Return how a line calls the plan of its step: by name where it is not the main one."""
    name = metrics.get("pipeline/plan", "main")
    return "plan" if name == "main" else f"plan {name}"


def further_line(name: str, plan: Plan) -> str:
    """Return a line about a plan beside the main one."""
    return (
        f"plan {name}: {plan.rules.describe_lengths()} of {len(plan.stages)} stages, predicted iteration "
        f"{plan.predicted.iteration_s:.3f} s, {plan.hash}"
    )


def start_table(plan: Plan, num_parameters: int, world_size: int) -> str:
    """Return what is about to run: stages with layers, nodes and visits, and the predicted iteration."""
    processes = "one process" if world_size == 1 else f"{world_size} processes"
    lines = [
        f"{num_parameters:,} parameters, {len(plan.microbatches)} microbatches over {plan.rules.describe_lengths()} of "
        f"{len(plan.stages)} stages, {processes}, plan {plan.hash}",
        f"{'stage':>5}  {'layers':9}{'visits':>7}  nodes",
    ]
    for index, stage in enumerate(plan.stages):
        layers = f"{stage.layers[0]}-{stage.layers[1] - 1}"
        lines.append(f"{index:>5}  {layers:9}{plan.visits[index]:>7}  {', '.join(stage.nodes)}")
    predicted = plan.predicted
    lines.append(f"predicted iteration {predicted.iteration_s:.3f} s (no plan below {predicted.lower_bound_s:.3f} s)")
    return "\n".join(lines)
