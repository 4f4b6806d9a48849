"""The update at the end of a step: all ranks make one sum, and behind it each takes the step, all of them or none."""

import time
from collections.abc import Sequence

from skippipe.errors import SkipPipeError
from skippipe.monitor.live.node_board import NodeReading
from skippipe.runtime.program.faults import Faults
from skippipe.training.steps.step_metrics import StepMeter
from skippipe.training.steps.step_totals import FinishedStep, StepBegin, StepTotals
from skippipe.training.steps.training_state import TrainingState


class StepUpdate:
    """Takes the steps of one process, and counts them."""

    def __init__(self, state: TrainingState, meter: StepMeter, faults: Faults) -> None:
        self._state = state
        self._meter = meter
        self._faults = faults

    def take(self, *, stop: bool, wants_epoch: bool) -> StepTotals:
        """Clip and step; called when all gradients are there. Nothing moves where one is not finite.

        The one sum over all ranks in a step is here: on slow links each costs a round trip or more. `stop` says whether
        this rank is asked to stop, `wants_epoch` as in `StepTotals`.
        """
        state, runner = self._state, self._state.runner
        squares = state.optimizer.squared_norm(runner.owned_parameters().values())
        tally, asked = runner.tally(), float(stop)
        state.contributed = state.step + 1
        self._faults.reached("STEP", state.step + 1)
        reading = NodeReading(tally.pace, tally.busy_s, tally.waiting_s, *state.memory.own())
        return self.apply(
            runner.sum_over_ranks(
                [squares, tally.loss, tally.exit_loss, asked, asked * runner.rank, float(wants_epoch)], own=reading
            )
        )

    def apply(self, sums: Sequence[float]) -> StepTotals:
        """Take the step whose gradients are there, once all ranks have given their part to its sum."""
        totals = StepTotals.of_sums(sums)
        self._faults.reached("UPDATED", self._state.step + 1)
        # What is held here takes the step also where another replica, whose part is awaited, is lost meanwhile.
        self._state.applied, self._state.sums = self._state.step + 1, tuple(sums)
        self.update_weights(totals)
        return totals

    def update_weights(self, totals: StepTotals) -> None:
        """Clip the gradients and step, unless something is not finite."""
        optimizer, max_norm = self._state.optimizer, self._state.experiment.training.max_grad_norm
        if totals.finite:
            if max_norm is not None:
                optimizer.clip(totals.grad_norm, max_norm)
            optimizer.step()

    def count(self, begun: StepBegin, totals: StepTotals) -> FinishedStep:
        """Count a step whose update is applied; raise `SkipPipeError` where it was not taken."""
        state, duration_s = self._state, time.perf_counter() - begun.start_s
        state.step += 1
        state.elapsed_s += duration_s
        if not totals.finite:
            raise SkipPipeError(
                f"step {state.step}: loss {totals.loss}, gradient norm {totals.grad_norm}; the step was not taken. "
                "Lower optimizer.lr, lengthen lr_scheduler.warmup_steps or set training.max_grad_norm, then continue "
                "from the newest checkpoint"
            )
        metrics = self._meter.metrics(begun, totals, duration_s)
        estimates = state.memory.estimates
        nodes = {each.node: reading for each, reading in zip(estimates, totals.readings, strict=False)}
        state.finished = totals.finished(metrics, nodes)
        state.work_is_left = True
        return state.finished
