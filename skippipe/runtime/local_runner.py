"""One process that holds every stage once and walks a plan's routes, one microbatch after another."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from skippipe.model.stage import Stage
from skippipe.runtime.gradients.reduction import fill_missing, scale, visit_factor
from skippipe.runtime.plans.plan_set import MAIN_PLAN, PlanSet
from skippipe.runtime.runner import BatchLoader, IterationResult, IterationTotals, Span, computing_s
from skippipe.runtime.runner_options import RunnerOptions
from skippipe.runtime.stage_compute import make_compute
from skippipe_scheduler.plan.plan import Plan, Route

Result = TypeVar("Result")


class LocalRunner:
    """The reference that distributed runs must equal; also training and evaluation without torchrun."""

    def __init__(self, plans: Plan | PlanSet, stages: Mapping[int, Stage], options: RunnerOptions) -> None:
        self.plans = PlanSet.of(plans)
        self.rank = 0
        self.iteration = 0
        self.stages = dict(stages)
        self._options = options
        self._splits = {name: _split_at_stages(plan) for name, plan in self.plans.items()}
        self._scales = {
            name: {stage: options.scales(plan, stage) for stage in stages} for name, plan in self.plans.items()
        }
        self._compute = {index: make_compute(stage, self.plans, options) for index, stage in stages.items()}
        self._spans: list[Span] = []
        self.replicas: ProcessGroup | None = None
        self._reduction: Callable[[float], None] | None = None

    def with_replicas(self, call: Callable[[], Result]) -> Result:
        """Call: there is no other replica."""
        return call()

    def reduce_with(self, reduction: Callable[[float], None] | None) -> None:
        """Hand the gradients to the optimizer; see `Runner`."""
        self._reduction = reduction

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters that are trained, under the names they are stored by."""
        return {
            name: parameter for stage in self.stages.values() for name, parameter in stage.trained_parameters().items()
        }

    def owned_parameters(self) -> dict[str, nn.Parameter]:
        """Return all of them: there is no other process."""
        return self.parameters()

    def train_iteration(
        self,
        batch: BatchLoader,
        step: Callable[[], Result],
        plan: str = MAIN_PLAN,
        before_reduction: Callable[[], None] | None = None,
    ) -> IterationResult[Result]:
        """Run one iteration of a plan; see `Runner`."""
        started_s = time.perf_counter()
        walked = self.plans[plan]
        self.iteration += 1
        num_microbatches = len(walked.microbatches)
        for index, compute in self._compute.items():
            compute.reset(num_microbatches, self._splits[plan][index], self.iteration - 1, self._scales[plan][index])
            self.stages[index].train()
            self.stages[index].zero_grad(set_to_none=True)
        spans: list[Span] = []
        self._spans = spans
        for microbatch in walked.microbatches:
            self._train_microbatch(walked, microbatch, batch(microbatch.id), spans, started_s)
        if before_reduction is not None:
            before_reduction()
        for index, stage in self.stages.items():
            factor = visit_factor(self._options.gradient_normalization, num_microbatches, walked.visits[index])
            scale(fill_missing(stage.trained_parameters().values()), factor)
        if self._reduction is not None:
            self._reduction(1.0)
        step_result = step()
        self._compute[0].finish()
        totals = self.tally()
        duration_s = time.perf_counter() - started_s
        return IterationResult(totals.loss, duration_s, totals.busy_s, spans, transfers=(), step_result=step_result)

    def tally(self) -> IterationTotals:
        """Return loss and busy time of the iteration; see `Runner`."""
        return IterationTotals(self._compute[0].loss_sum, computing_s(self._spans), self._compute[0].exit_loss_sum)

    def _train_microbatch(
        self, plan: Plan, walk: Route, samples: tuple[Tensor, Tensor], spans: list[Span], started_s: float
    ) -> None:
        """Walk one microbatch forward, through the loss, and backward."""
        microbatch, route = walk.id, walk.route

        def timed(node: str, operation: str, task: Callable[[], Tensor | None]) -> Tensor | None:
            start_s = time.perf_counter() - started_s
            result = task()
            self._compute[0].finish()
            spans.append(Span(node, operation, microbatch, start_s, time.perf_counter() - started_s))
            return result

        origin = self._compute[0]
        origin.load(microbatch, *samples)
        visited = [(node, self._compute[plan.stage_of[node]]) for node in route]
        hidden: Tensor | None = None  # (B, T, D) from here on
        for node, compute in visited:
            output = timed(node, "F", partial(compute.forward, microbatch, hidden))
            hidden = self._travelled(output)
        gradient = timed(route[0], "L", lambda: origin.loss(microbatch, hidden))  # type: ignore[arg-type]  # routes are not empty
        for node, compute in reversed(visited):
            arrived: Any = self._travelled(gradient)  # (B, T, D); None is what the origin returns, which is the last
            gradient = timed(node, "B", partial(compute.backward, microbatch, arrived))
            if microbatch in compute.split:
                timed(node, "W", partial(compute.weight, microbatch))

    def _travelled(self, tensor: Tensor | None) -> Tensor | None:
        """Round (B, T, D) as the way to another rank would; relays on it round nothing further."""
        return None if tensor is None else self._options.wire.rounded(tensor)

    def evaluate(self, batch: BatchLoader, num_microbatches: int) -> float:
        """Return the mean loss at full depth; see `Runner`."""
        origin = self._compute[0]
        origin.reset(num_microbatches)
        for stage in self.stages.values():
            stage.eval()
        with torch.no_grad():
            for microbatch in range(num_microbatches):
                origin.load(microbatch, *batch(microbatch))
                hidden: Tensor | None = None
                for index in self.plans.main.present_stages:
                    hidden = self._travelled(self._compute[index].forward(microbatch, hidden))
                if hidden is not None:
                    origin.loss(microbatch, hidden)
        return origin.loss_sum

    def sum_over_ranks(self, values: Sequence[float], own: Sequence[float] = ()) -> list[float]:
        """Return the values: there is no other rank."""
        return [float(value) for value in (*values, *own)]

    def abort(self) -> None:
        """Wait for nobody; see `Runner`."""

    def barrier(self) -> None:
        """Return at once: there is no other rank."""

    def close(self) -> None:
        """Return at once: there is nothing to release."""


def _split_at_stages(plan: Plan) -> tuple[frozenset[int], ...]:
    """Return the microbatches whose backward is split at each stage, whatever replica they visit."""
    return tuple(frozenset().union(*(plan.split_of[node] for node in stage.nodes)) for stage in plan.stages)
