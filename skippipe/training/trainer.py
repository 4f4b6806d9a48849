"""A run between two steps: what one process does in every step, the same on every rank, whatever runner is below."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from torch import Tensor

from skippipe.checkpoint.reader import Metadata, checkpoint_path, load_parameters, load_tensors, model_identity
from skippipe.checkpoint.writer import CheckpointWriter
from skippipe.cluster.measured import write_measured
from skippipe.config.experiment import Experiment
from skippipe.data.kept_tokenizer import keep_tokenizer
from skippipe.data.samples import SampleOrder
from skippipe.errors import CheckpointError, CommunicationError, SkipPipeError, StoppedError, StorageError
from skippipe.model.architecture import attention_in_use, experiment_model
from skippipe.model.cost import ModelCost, model_cost
from skippipe.model.device import torch_dtype
from skippipe.monitor.console import further_line, start_table
from skippipe.monitor.metrics import Metric, StepMetrics
from skippipe.monitor.run_events import RestoredStage
from skippipe.monitor.sinks import Reporter, open_reporter
from skippipe.monitor.storage_watch import StorageWatch
from skippipe.monitor.terminal import say
from skippipe.monitor.wandb_place import WandbPlace
from skippipe.monitor.wandb_run import wandb_id
from skippipe.planning.measured_for import experiment_measured_for
from skippipe.runtime.plans.plan_schedule import PlanSchedule
from skippipe.runtime.plans.plan_set import MAIN_PLAN, PlanSet
from skippipe.runtime.program.faults import Faults
from skippipe.runtime.ranks.agreement import all_gather_json, on_all_ranks, on_first_rank
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic
from skippipe.runtime.runner import Runner
from skippipe.runtime.runner_factory import make_runner_of_epoch, make_unconnected_runner
from skippipe.training.measurement.memory_report import MemoryReport, estimate_memory
from skippipe.training.measurement.step_trace import TraceRecorder
from skippipe.training.measurement.utilisation import IterationFlop, utilisation
from skippipe.training.optimizer import make_optimizer
from skippipe.training.patience import StepPatience
from skippipe.training.recovery.progress import ProgressReport, Settlement
from skippipe.training.recovery.run_facts import TrainerFacts
from skippipe.training.recovery.run_recovery import FindState, RunRecovery
from skippipe.training.recovery.stage_state import StageState
from skippipe.training.recovery.state_source import FoundState, WantedState
from skippipe.training.run_directory import check_nothing_beyond, choose_checkpoint, record_inputs
from skippipe.training.run_owner import RunOwner
from skippipe.training.signals import StopSignal
from skippipe.training.startup import Hardware, changed_settings, trained_settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingSummary:
    """How a training ended.

    Examples:
        >>> summary.first_step, summary.step, summary.tokens, summary.stopped
        (0, 2, 1024, False)
        >>> summary.checkpoint.name
        'step-00000002'
    """

    first_step: int
    """Optimizer steps that were done before."""
    step: int
    """Optimizer steps that are done now, those before included."""
    tokens: int
    """Tokens trained on, in all steps."""
    loss: float | None
    """Loss of the last step in nats per token; None where there was nothing left to do, or a step was given up."""
    stopped: bool
    """Whether a signal ended it before `training.max_steps`."""
    stopped_by: int | None
    """The rank that the signal came to; None where none did, or several."""
    checkpoint: Path | None
    """Directory of the last checkpoint; None where there was nothing left to do."""
    rank: int
    """The process that says this."""


class StepTotals(NamedTuple):
    """What all ranks agree on in one sum at STEP."""

    loss: float
    exit_loss: float
    grad_norm: float
    busy_s: float
    stop: bool
    """Whether any rank was asked to stop."""
    stopped_by: int | None
    """The only rank that was asked to stop; None where none was, or several."""
    comes: bool
    """Whether any rank knows of somebody who waits to be taken in."""
    peak_bytes: Sequence[float]
    """Most memory of every rank so far."""

    @classmethod
    def of_sums(cls, sums: Sequence[float]) -> Self:
        """Take what the ranks have added up, in the order of `Trainer._update`."""
        squares, loss, exit_loss, busy_s, stops, askers, comers, *peak_bytes = sums
        only = int(askers) if stops == 1 else None
        return cls(loss, exit_loss, math.sqrt(squares), busy_s, stops > 0, only, comers > 0, peak_bytes)

    @property
    def finite(self) -> bool:
        """Whether the step may be taken."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class StepBegin(NamedTuple):
    """A step that is under way."""

    plan: str
    lr: float
    start_s: float


class FinishedStep(NamedTuple):
    """A step whose update is applied, and that is still to be validated, reported and saved."""

    metrics: StepMetrics
    stop: bool
    """Whether any rank was asked to stop."""
    comes: bool
    """Whether somebody waits to be taken in."""


class Trainer:
    """The state of a run between two steps. All ranks make theirs, then `restore` it and `open_records`, together."""

    def __init__(
        self,
        experiment: Experiment,
        runner: Runner,
        order: SampleOrder,
        context: DistributedContext,
        hardware: Hardware,
        memory: MemoryReport,
        owner: RunOwner,
        recovery: RunRecovery | None = None,
    ) -> None:
        self.experiment, self.runner, self.order, self.context = experiment, runner, order, context
        self.memory, self.owner, self.recovery = memory, owner, recovery
        self.run_dir = experiment.run_path
        self.schedule = PlanSchedule.of(experiment)
        self.hardware = hardware
        self.step = 0
        self._node = runner.plans.main.nodes[context.rank]
        self._faults = Faults(experiment.emulation.faults, self._node)
        self._applied = self._contributed = 0
        self._sums: tuple[float, ...] | None = None
        self._begun: StepBegin | None = None
        self._finished: FinishedStep | None = None
        self._work_is_left = False
        self._device_types = dict(zip(runner.plans.main.nodes, hardware.device_types, strict=False))
        self._reported = self._saved = 0
        self._has_other_plans = False
        self.elapsed_s = 0.0
        self.config = experiment_model(experiment)
        training = experiment.training
        self.tokens_per_step = training.num_microbatches * training.micro_batch_size * training.sequence_length
        self.optimizer = make_optimizer(experiment, runner)
        runner.reduce_with(self.optimizer.reduce)
        self.first_step = 0
        self.patience: StepPatience | None = None
        self._stopped_by: int | None = None
        self.wandb_id: str | None = None
        self.lacks_state = False
        """Whether this process has nothing yet of its stage: it has come lately, or has taken it over."""
        self._has_moved = False
        self._squared_norm = 0.0
        self.restored: RestoredStage | None = None
        """From what this process has the stage, where that was older than what the others stood at."""
        self.trace = TraceRecorder(self.run_dir, runner.rank)
        self.reporter = Reporter()
        self._storage = StorageWatch(experiment.checkpoint.timeout_s)
        self._keeps_records = False
        self._flop = IterationFlop(self._cost(), experiment.recipe, experiment.training.max_steps)
        self._use(runner)

    def _use(self, runner: Runner) -> None:
        """Take a runner, and what follows from its plans."""
        self.runner, self.plans, self.world_size = runner, runner.plans, self.context.world_size
        checkpoint, store = self.experiment.checkpoint, self.context.store
        kept = None if self.recovery is None else self.recovery.copies
        self.writer = CheckpointWriter(self.run_dir, runner, self.optimizer, checkpoint, store, self.world_size, kept)

    def restore(self) -> None:
        """Go to where the checkpoint that the experiment names left the run, where there is one."""
        checkpoint = choose_checkpoint(self.experiment, self.context)
        if checkpoint is None:
            return
        metadata = on_all_ranks(self.context, Topic.CHECKPOINT_LOADED, lambda: self._load(checkpoint))
        self.first_step = self._applied = self._contributed = self._reported = self.step
        self.wandb_id = metadata.wandb_id

    def open_records(self) -> None:
        """Write config.yaml and the plans, print the start table, open metrics.jsonl and the monitors, on rank 0.

        Raises on all ranks where it cannot.
        """
        owned = sum(parameter.numel() for parameter in self.runner.owned_parameters().values())
        total = sum(all_gather_json(self.context, Topic.NUM_PARAMETERS, lambda: owned))
        self.wandb_id = on_first_rank(self.context, Topic.RECORDS, lambda: self._open_records(total))
        if self.recovery is not None:
            self.recovery.publish(self)

    def run(self, stop: StopSignal) -> TrainingSummary:
        """Train, validate, save; return how it ended. Rank 0 prints the memory of all ranks."""
        stop.defer()
        abort = (lambda: self.runner.abort()) if self.world_size > 1 else None
        self.patience = StepPatience(stop, self.experiment.checkpoint.patience_s, abort)
        if self.context.watch is not None:
            self.context.watch.also = self.patience.look
        try:
            while True:
                reason = ""
                try:
                    return self._run(stop)
                except CommunicationError as lost:
                    if self.recovery is None:
                        raise
                    reason = str(lost)
                # Outside of the except block, see `runtime.ranks.torch_errors.raising_outside`.
                self.recovery.go_on(self, reason)
        except StoppedError as reason:
            return self._stop_early(str(reason))

    def _run(self, stop: StopSignal) -> TrainingSummary:
        max_steps = self.experiment.training.max_steps
        while self._work_is_left or not (self.step >= max_steps or (self._finished and self._finished.stop)):
            if not self._work_is_left:
                self.one_step(stop)
            self._complete_step(stop)
            self._between_steps()
        loss = None if self._finished is None else self._finished.metrics[Metric.TRAIN_LOSS]
        saved = self._saved == self.step or self.writer.finish()
        if saved and loss is not None:
            self._saved = self.step
        if loss is not None and not saved:
            raise StorageError(
                f"step {self.step}: the last checkpoint could not be saved in {self.run_dir}, see the warning above; "
                "make room or set run_dir, and start again to continue from the newest complete one"
            )
        if loss is not None and self.world_size > 1 and not self._has_other_plans:
            self._write_measured()
        if loss is not None and self.runner.rank == 0:
            say(self.memory.table())
        path = checkpoint_path(self.run_dir, self.step) if saved else None
        tokens, stopped = self.step * self.tokens_per_step, self.step < max_steps
        who = self._stopped_by if stopped else None
        return TrainingSummary(self.first_step, self.step, tokens, loss, stopped, who, path, self.runner.rank)

    def _stop_early(self, reason: str) -> TrainingSummary:
        """Save what was finished before the step that was given up; connections between ranks are closed."""
        if self.step == self.first_step:
            raise StoppedError(f"step {self.step + 1}: {reason}; no step of this start is finished, nothing to save")
        logger.warning("step %d: %s; it is given up, and step %d saved", self.step + 1, reason, self.step)
        if not self.writer.save_alone(self._metadata()):
            raise StorageError(f"step {self.step}: the last checkpoint could not be saved, see the warning above")
        tokens, path = self.step * self.tokens_per_step, checkpoint_path(self.run_dir, self.step)
        return TrainingSummary(self.first_step, self.step, tokens, None, True, None, path, self.runner.rank)

    def close(self) -> None:
        """End the writing of checkpoints and close records, optimizer and connections."""
        self.writer.close()
        self._storage.close()
        self.reporter.close()
        self.optimizer.close()
        self.runner.close()

    def one_step(self, stop: StopSignal) -> FinishedStep:
        """Run one iteration; what is to be done after it is left."""
        self.context.check()
        if self.patience is not None:
            self.patience.begin()
        start_s = time.perf_counter()
        self._faults.reached("BEGIN", self.step + 1)
        lr = self.optimizer.lr
        plan = self.schedule.plan_of(self.step + 1)
        self._begun = StepBegin(plan, lr, start_s)
        result = self.runner.train_iteration(self._train_batch, lambda: self._update(stop), plan)
        if plan == MAIN_PLAN:  # what reads the trace compares it with the main plan
            self.trace.record(self.step + 1, result.spans, result.transfers)
        return self._finish_step(self._begun, result.step_result)

    def _finish_step(self, begun: StepBegin, totals: StepTotals) -> FinishedStep:
        """Count a step whose update is applied."""
        duration_s = time.perf_counter() - begun.start_s
        self.step += 1
        self.elapsed_s += duration_s
        if not totals.finite:
            raise SkipPipeError(
                f"step {self.step}: loss {totals.loss}, gradient norm {totals.grad_norm}; the step was not taken. "
                "Lower optimizer.lr, lengthen lr_scheduler.warmup_steps or set training.max_grad_norm, then continue "
                "from the newest checkpoint"
            )
        metrics = self._metrics(begun, totals, duration_s) | self.memory.metrics(totals.peak_bytes)
        self._stopped_by = totals.stopped_by
        self._finished, self._work_is_left = FinishedStep(metrics, totals.stop, totals.comes), True
        return self._finished

    def _complete_step(self, stop: StopSignal) -> None:
        """Validate, report and save what the last step has come to, as far as it is due; all ranks together."""
        assert self._finished is not None
        metrics, stopped, _ = self._finished
        if stopped:
            self._say_stopped(stop)
        if self.writer.blocked_s is not None:
            metrics[Metric.BLOCKED_S], self.writer.blocked_s = self.writer.blocked_s, None
        if self._due(self.experiment.evaluation.interval):
            metrics |= self._validate()
        self.owner.check_last_beat()
        if self._reported < self.step:
            with self._storage.writing(self.run_dir / "metrics.jsonl"):
                self.reporter.write(metrics)
        self._reported = self.step
        if self._due(self.experiment.checkpoint.interval) or stopped or self.step >= self.experiment.training.max_steps:
            self._save()
        self._work_is_left = False

    def _between_steps(self) -> None:
        """Make a copy of the stage where it is due, and let those come who wait for it; all ranks together."""
        assert self._finished is not None
        is_last = self._finished.stop or self.step >= self.experiment.training.max_steps
        if self.recovery is None or is_last:
            return
        self.recovery.copies.between_steps(self.step, self.stage_state)
        if not self._finished.comes:
            return
        self.writer.finish()  # what is being written belongs to ranks of the present epoch
        self.recovery.go_on(self, "a node comes", interrupted=False)

    def facts(self) -> TrainerFacts:
        """Say what the trainers of all members have in common; see `Recoverable`."""
        hardware, cache = self.hardware, self.order.cache
        return TrainerFacts(
            devices=hardware.devices,
            peak_tflop_per_s=hardware.peak_tflop_per_s,
            device_types=self._device_types,
            fingerprint=cache.fingerprint,
            num_tokens=len(cache.train) + len(cache.validation),
            wandb_id=self.wandb_id,
        )

    @property
    def stage(self) -> int:
        """The stage that this process holds, of several processes; see `Recoverable`."""
        (index,) = self.runner.stages
        return index

    def stage_state(self) -> StageState:
        """Return what is held of the stage; see `Recoverable`."""
        parameters = self.runner.stages[self.stage].state_dict_global()
        optimizer = self.optimizer.state(parameters)
        return StageState(self.step, self.elapsed_s, parameters, optimizer, squared_norm=self._squared_norm)

    def _state_with_gradients(self) -> StageState:
        """Return what is held of the stage, and the gradients of the step that comes next."""
        parameters = self.runner.parameters().items()
        gradients = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
        return self.stage_state()._replace(gradients=gradients)

    def _change_stage(self, index: int, plans: PlanSet) -> None:
        """Let go of the stage that this process holds, and have another one, so far without its state."""
        self.lacks_state = self._has_moved = True
        self.runner = make_unconnected_runner(self.experiment, plans, index, self.context)
        self.optimizer.close()
        self.optimizer = make_optimizer(self.experiment, self.runner)
        self.runner.reduce_with(self.optimizer.reduce)

    def _take_stage_state(self, found: FoundState, step: int, sums: Sequence[float] | None) -> None:
        """Go on after `step` from a state of the stage; one of that step goes on bit by bit.

        One of the step before it that has the gradients takes the step by its `sums`.
        """
        state = found.state
        can_step = state.step == step - 1 and bool(state.gradients) and sums is not None
        self.runner.stages[self.stage].load_global(state.parameters)
        self.optimizer.load(state.optimizer, step - can_step)
        if can_step and sums is not None:
            for name, parameter in self.runner.parameters().items():
                parameter.grad = state.gradients[name].to(parameter.device)
            self._update_weights(StepTotals.of_sums(sums))
        self._applied = self._contributed = step
        self._sums = None if sums is None else tuple(sums)
        if self._begun is None:
            self.elapsed_s = state.elapsed_s
            self.step = self.first_step = self._reported = step
        of_step = state.step + can_step
        if found.place != "a replica" and (self._has_moved or of_step < step):
            node = self._node if self._has_moved else None
            self.restored = RestoredStage(stage=self.stage, place=found.place, of_step=of_step, node=node)
        self.lacks_state = self._has_moved = False

    def progress(self) -> ProgressReport | None:
        """Say where this process stands; see `Recoverable`."""
        if self.lacks_state:
            return None
        left = self._work_is_left or self.writer.unconfirmed_step == self.step
        return ProgressReport(step=self._applied, contributed=self._contributed, totals=self._sums, work_is_left=left)

    def leave_epoch(self) -> None:
        """Let go of all connections; see `Recoverable`."""
        self.writer.abandon()
        self.runner.abort()
        self.runner.close()

    def enter_epoch(self, plans: PlanSet) -> None:
        """Connect to the others along new plans; see `Recoverable`."""
        estimates = estimate_memory(self.experiment, plans, [self._device_types[node] for node in plans.main.nodes])
        self.memory = self.memory.of_ranks(estimates, self.context.rank)
        self._has_other_plans = True
        self._use(make_runner_of_epoch(self.experiment, plans, self.runner, self.context))
        self.runner.iteration = self.step
        if self.context.rank == 0 and not self._keeps_records:
            self._take_over_records()

    def follow(self, settlement: Settlement, plans: PlanSet, find: FindState) -> None:
        """Take the last step that another one has taken, and count it, or change the stage; see `Recoverable`."""
        step, sums, work_is_left, standing = settlement
        index = plans.main.stage_of[self._node]
        if index != self.stage:
            self._change_stage(index, plans)
        if self.lacks_state:
            wanted = WantedState(index, tuple(self.runner.parameters()), plans.main, standing)
            self._take_stage_state(find(wanted), step, sums)
            if self._begun is None and work_is_left and sums is not None:
                # It takes part in what is still to be done behind that step.
                totals = StepTotals.of_sums(sums)
                metrics: StepMetrics = {Metric.STEP: step, Metric.TRAIN_LOSS: totals.loss}
                self._finished = FinishedStep(metrics, totals.stop, totals.comes)
        if self._applied < step and sums is not None:
            self._apply(sums)
        if self.step < step and self._begun is not None and self._sums is not None:
            self._finish_step(self._begun, StepTotals.of_sums(self._sums))
        self._work_is_left = work_is_left and self._finished is not None

    def _take_over_records(self) -> None:
        """Write the records from now on, in place of a process that is lost; it may not have written the last step."""
        self.owner.take_over()
        self._keeps_records = True
        before = self.step - (self._finished is not None)
        self.reporter = open_reporter(self.experiment, before, self.wandb_id)
        self._reported = before
        if self._finished is not None and not self._work_is_left:
            self.reporter.write(self._finished.metrics)
            self._reported = self.step

    def _say_stopped(self, stop: StopSignal) -> None:
        """Say on every rank why it ends now: each host has a log of its own."""
        rank = self._stopped_by
        who = f"{stop.name} to this rank" if stop.requested else "a signal to another rank"
        if rank is not None and not stop.requested:
            who = f"a signal to rank {rank} ({self.plans.main.nodes[rank]})"
        logger.warning("step %d: the run stops here, on all ranks, by %s", self.step, who)

    def _update(self, stop: StopSignal) -> StepTotals:
        """Clip and step; called by the runner when all gradients are there. Nothing moves where one is not finite.

        The one sum over all ranks in a step is here: on slow links each costs a round trip or more.
        """
        if self.patience is not None:
            self.patience.commit()
        own = self.optimizer.squared_norm(self.runner.owned_parameters().values())
        if self.recovery is not None:
            self._keep_for_others(self.recovery)
        tally = self.runner.tally()
        asked = float(stop.requested)
        comers = float(self.recovery is not None and self.recovery.applicants)
        self._contributed = self.step + 1
        self._faults.reached("STEP", self.step + 1)
        return self._apply(
            self.runner.sum_over_ranks(
                [
                    *(own, tally.loss, tally.exit_loss, tally.busy_s),
                    *(asked, asked * self.runner.rank, comers),
                    *self.memory.own(),
                ]
            )
        )

    def _keep_for_others(self, recovery: RunRecovery) -> None:
        """Note of the gradients what others need should this process be lost, before anybody takes the step."""
        if "rebuild" in self.experiment.recovery.lost_stage:
            layers = self.runner.stages[self.stage].layers.parameters()
            self._squared_norm = self.optimizer.squared_norm(layers)
        recovery.copies.before_sum(self.step, self._state_with_gradients, self.context.check)

    def _apply(self, sums: Sequence[float]) -> StepTotals:
        """Take the step whose gradients are there, once all ranks have given their part to its sum."""
        totals = StepTotals.of_sums(sums)
        self._faults.reached("UPDATED", self.step + 1)
        self._update_weights(totals)
        self._applied, self._sums = self.step + 1, tuple(sums)
        return totals

    def _update_weights(self, totals: StepTotals) -> None:
        """Clip the gradients and step, unless something is not finite."""
        if totals.finite:
            if self.experiment.training.max_grad_norm is not None:
                self.optimizer.clip(totals.grad_norm, self.experiment.training.max_grad_norm)
            self.optimizer.step()

    def _metrics(self, begun: StepBegin, totals: StepTotals, duration_s: float) -> StepMetrics:
        exits = {Metric.EARLY_EXIT_LOSS: totals.exit_loss} if self.experiment.recipe.early_exit_loss > 0 else {}
        return (
            {
                Metric.STEP: self.step,
                Metric.TRAIN_LOSS: totals.loss,
                Metric.GRADIENT_NORM: totals.grad_norm,
                Metric.LEARNING_RATE: begun.lr,
                Metric.ITERATION_S: duration_s,
                Metric.TOKENS_PER_S: self.tokens_per_step / duration_s,
                Metric.ELAPSED_S: self.elapsed_s,
                Metric.PLAN: begun.plan,
                Metric.PREDICTED_S: self.plans[begun.plan].predicted.iteration_s,
                Metric.BUBBLE_FRACTION: max(0.0, 1 - totals.busy_s / (self.world_size * duration_s)),
                Metric.TOKENS: self.step * self.tokens_per_step,
                Metric.NODES: self.world_size,
            }
            | exits
            | utilisation(
                self._flop.of(self.plans[begun.plan], self.step - 1), duration_s, self.hardware.peak_tflop_per_s
            )
        )

    def _cost(self) -> ModelCost:
        training = self.experiment.training
        dtype = torch_dtype(training.dtype)
        return model_cost(self.config, training.micro_batch_size, training.sequence_length, dtype)

    def _validate(self) -> StepMetrics:
        self._faults.reached("VALIDATION", self.step)
        training = self.experiment.training
        num_microbatches = self.experiment.evaluation.batches * training.num_microbatches
        loss = self.runner.evaluate(
            lambda microbatch: self.order.validation_batch(microbatch, training.micro_batch_size), num_microbatches
        )
        return {Metric.VALIDATION_LOSS: loss, Metric.VALIDATION_PERPLEXITY: math.exp(min(loss, 700.0))}

    def _train_batch(self, microbatch: int) -> tuple[Tensor, Tensor]:
        if self.patience is not None:
            self.patience.check()
        training = self.experiment.training
        return self.order.batch(self.step, microbatch, training.num_microbatches, training.micro_batch_size)

    def _due(self, interval: int) -> bool:
        return interval > 0 and self.step % interval == 0

    def _save(self) -> None:
        self._faults.reached("CHECKPOINT", self.step)
        missing = self._missing_stages()
        if missing:
            if self.runner.rank == 0:
                logger.warning("step %d: no checkpoint, as nobody has stage %d or a copy of it", self.step, missing[0])
            return
        on_first_rank(self.context, Topic.OWNER, self.owner.check)
        try:
            with self._storage.writing(self.run_dir / "trace"):
                self.trace.write()
                if self.runner.rank == 0:
                    self.memory.write(self.run_dir)
        except SkipPipeError as reason:
            logger.warning("step %d: %s", self.step, reason)
        self.writer.save(self._metadata())

    def _missing_stages(self) -> list[int]:
        """Return the stages of which no member has anything; all ranks call this together."""
        absent = self.plans.main.rules.absent_stages or ()
        if self.recovery is None or not absent:
            return []
        copies = self.recovery.copies
        kept = all_gather_json(self.context, Topic.KEPT_STAGES, lambda: copies.kept_stages)
        return sorted(set(absent) - {stage for stages in kept for stage in stages})

    def _write_measured(self) -> None:
        """Write what tasks and transfers took, on rank 0, once every rank has written its trace."""
        self.runner.barrier()
        if self.runner.rank == 0:
            try:
                plan = self.plans.main
                measured_for = experiment_measured_for(self.experiment, len(plan.stages))
                write_measured(self.run_dir, plan, Path(self.experiment.cluster), measured_for)
            except SkipPipeError as reason:
                logger.warning("measured.yaml is not written: %s", reason)

    def _metadata(self) -> Metadata:
        training = self.experiment.training
        return Metadata(
            step=self.step,
            tokens=self.step * self.tokens_per_step,
            elapsed_s=self.elapsed_s,
            seed=self.experiment.seed,
            dtype=training.dtype,
            model=model_identity(self.config),
            data=self.order.cursor(self.step, training.num_microbatches, training.micro_batch_size),
            plan_hash=self.plans.hash,
            wandb_id=self.wandb_id,
            settings=trained_settings(self.experiment),
            files={},
        )

    def _load(self, checkpoint: Path) -> Metadata:
        """Put this rank's stages and optimizer where the checkpoint left them."""
        training = self.experiment.training
        metadata = load_parameters(checkpoint, self.config, self.runner.stages.values())
        if metadata.step and metadata.dtype != training.dtype:
            raise CheckpointError(
                f"training.dtype: {training.dtype}, but {checkpoint} was trained in {metadata.dtype}; continue with "
                f"training.dtype={metadata.dtype}, or export the run and import it into a new one"
            )
        if metadata.step and self.runner.rank == 0:
            self._say_what_changed(checkpoint, metadata)
        if metadata.step:
            self.order.check_cursor(metadata.data, metadata.step, training.num_microbatches, training.micro_batch_size)
        self.optimizer.load(load_tensors(checkpoint, metadata, "optimizer", self.optimizer.names), metadata.step)
        self.step, self.elapsed_s = metadata.step, metadata.elapsed_s
        self.runner.iteration = self.step
        return metadata

    def _say_what_changed(self, checkpoint: Path, metadata: Metadata) -> None:
        """Say what is not as it was when the checkpoint was written, which nothing refuses."""
        if metadata.plan_hash != self.plans.hash:
            logger.warning(
                "%s was written under plan %s, the run goes on under %s: its losses are not those of a run that never "
                "stopped",
                checkpoint,
                metadata.plan_hash,
                self.plans.hash,
            )
        changed = changed_settings(metadata.settings or {}, trained_settings(self.experiment))
        if changed:
            logger.warning("%s was trained with other settings, the run goes on with %s", checkpoint, changed)

    def _open_records(self, num_parameters: int) -> str | None:
        """Do what `open_records` says, on rank 0; return the id of the W&B run."""
        check_nothing_beyond(self.experiment, self.step)
        record_inputs(self.experiment, self.plans)
        keep_tokenizer(self.experiment.data, self.order.cache.tokenizer, self.run_dir, anew=not self.step)
        self.wandb_id = wandb_id(self.run_dir, self.experiment.logging.wandb, self.wandb_id)
        say(start_table(self.plans.main, num_parameters, self.world_size))
        for name, plan in self.plans.further.items():
            say(further_line(name, plan))
        attention = attention_in_use(next(iter(self.runner.stages.values())).body.config)
        say(f"computing on {self.hardware.devices} in {self.experiment.training.dtype}, attention {attention}")
        say(self.memory.table())
        if self.recovery is not None:
            say(self.recovery.invitation)
        say(str(WandbPlace.of(self.experiment.logging.wandb, self.run_dir)))
        if self.step:
            say(f"continuing after step {self.step}")
        self.reporter, self._keeps_records = open_reporter(self.experiment, self.step, self.wandb_id), True
        return self.wandb_id
