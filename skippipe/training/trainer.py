"""A run step by step: what one process does in every step, the same on every rank, whatever runner is below."""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from skippipe.checkpoint.disks.peer_files import PeerFiles
from skippipe.checkpoint.reader import checkpoint_path
from skippipe.config.experiment import Experiment
from skippipe.data.samples import SampleOrder
from skippipe.errors import CommunicationError, StoppedError, StorageError
from skippipe.monitor.console import ParameterCounts
from skippipe.monitor.metrics import Metric, StepMetrics
from skippipe.monitor.terminal import say
from skippipe.runtime.plans.plan_schedule import PlanSchedule
from skippipe.runtime.plans.plan_set import JOINING_PLAN, MAIN_PLAN
from skippipe.runtime.program.faults import Faults
from skippipe.runtime.ranks.agreement import all_gather_json, on_all_ranks, on_first_rank
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic
from skippipe.runtime.runner import Runner
from skippipe.training.measurement.memory_report import MemoryReport
from skippipe.training.records.run_checkpoints import RunCheckpoints
from skippipe.training.records.run_records import RunRecords
from skippipe.training.recovery.recoverable_training import RecoverableTraining
from skippipe.training.recovery.run_recovery import RunRecovery
from skippipe.training.run_directory import check_nothing_beyond_elsewhere
from skippipe.training.run_owner import RunOwner
from skippipe.training.signals import StopSignal
from skippipe.training.startup import Hardware
from skippipe.training.steps.patience import StepPatience
from skippipe.training.steps.step_metrics import StepMeter
from skippipe.training.steps.step_totals import FinishedStep, StepBegin, StepTotals
from skippipe.training.steps.step_update import StepUpdate
from skippipe.training.steps.training_state import TrainingState

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


class Trainer:
    """A run in one process. All ranks make theirs, then `restore` it and `open_records`, together."""

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
        peers: PeerFiles | None = None,
    ) -> None:
        self.experiment, self.order, self.context = experiment, order, context
        self._hardware, self._owner, self._recovery = hardware, owner, recovery
        self._max_steps = experiment.training.max_steps
        self.schedule = PlanSchedule.of(experiment)
        self.state = state = TrainingState(
            experiment, context, runner, memory, owner.disks, peers, outlives=recovery is not None
        )
        self._faults = Faults(experiment.emulation.faults, state.node)
        self._update = StepUpdate(state, StepMeter(state, hardware.peak_tflop_per_s), self._faults)
        self._patience: StepPatience | None = None
        self._saved = 0
        self._ended = False
        self.records = RunRecords(state, owner)
        copies = None if recovery is None else recovery.copies
        self.checkpoints = RunCheckpoints(state, self.records, order, copies)
        self.recoverable: RecoverableTraining | None = None
        """What brings it into another epoch; None where the run ends with any of its processes."""
        if copies is not None:
            self.recoverable = RecoverableTraining(
                state, self._update, self.records, self.checkpoints, order, hardware, copies
            )

    def restore(self) -> None:
        """Go to where the checkpoint that the experiment names left the run, where there is one."""
        self.checkpoints.restore()

    def open_records(self) -> None:
        """Write config.yaml and the plans on each disk; print the start table, open metrics and monitors on rank 0.

        Raises on all ranks where it cannot.
        """
        runner = self.state.runner
        trained = sum(parameter.numel() for parameter in runner.owned_parameters().values())
        held = [parameter for stage in runner.stages.values() for parameter in stage.global_parameters().values()]
        owned = ParameterCounts(sum(parameter.numel() for parameter in held) if trained else 0, trained)
        counts = all_gather_json(self.context, Topic.NUM_PARAMETERS, lambda: list(owned))
        total = ParameterCounts(*map(sum, zip(*counts, strict=True)))
        if self.experiment.checkpoint.remote_save_folder is not None:
            after = self.state.step
            on_first_rank(
                self.context, Topic.CHECKPOINTS, lambda: check_nothing_beyond_elsewhere(self.experiment, after)
            )
        on_all_ranks(self.context, Topic.DISK_RECORDS, lambda: self.records.open_disk(self.order))
        self.records.spread_tokenizer()
        invitation = None if self._recovery is None else self._recovery.invitation
        self.records.wandb_id = on_first_rank(
            self.context, Topic.RECORDS, lambda: self.records.open(self._hardware, total, invitation)
        )
        if self._recovery is not None and self.recoverable is not None:
            self._recovery.publish(self.recoverable)

    def run(self, stop: StopSignal) -> TrainingSummary:
        """Train, validate, save; return how it ended. Rank 0 prints the memory of all ranks."""
        stop.defer()
        abort = (lambda: self.state.runner.abort()) if self.context.world_size > 1 else None
        self._patience = StepPatience(stop, self.experiment.checkpoint.patience_s, abort)
        if self.context.watch is not None:
            self.context.watch.also = self._patience.look
        try:
            while True:
                reason = ""
                try:
                    return self._run(stop)
                except CommunicationError as lost:
                    if self._recovery is None:
                        raise
                    reason = str(lost)
                # Outside of the except block, see `runtime.ranks.torch_errors.raising_outside`.
                self._go_on(reason, interrupted=True)
        except StoppedError as reason:
            return self._stop_early(str(reason))

    def close(self) -> None:
        """End the writing of checkpoints and close records, optimizer and connections."""
        self.checkpoints.close(in_order=self._ended)
        self.records.close()
        self.state.optimizer.close()
        self.state.runner.close()

    def one_step(self, stop: StopSignal) -> FinishedStep:
        """Run one iteration; what is to be done after it is left."""
        self.context.check()
        if self._patience is not None:
            self._patience.begin()
        start_s = time.perf_counter()
        state = self.state
        self._faults.reached("BEGIN", state.step + 1)
        is_joining = self._recovery is not None and self._recovery.is_joining
        plan = JOINING_PLAN if is_joining else self.schedule.plan_of(state.step + 1)
        state.begun = StepBegin(plan, state.optimizer.lr, start_s)
        before = self._complete_joining if is_joining else None
        result = state.runner.train_iteration(self._train_batch, lambda: self._take_step(stop), plan, before)
        if plan == MAIN_PLAN:  # what reads the trace compares it with the main plan
            self.records.trace.record(state.step + 1, result.spans, result.transfers)
        return self._update.count(state.begun, result.step_result)

    def _run(self, stop: StopSignal) -> TrainingSummary:
        state = self.state
        while state.work_is_left or not (state.step >= self._max_steps or (state.finished and state.finished.stop)):
            if not state.work_is_left:
                self.one_step(stop)
            self._complete_step(stop)
            self._between_steps()
        loss = None if state.finished is None else state.finished.metrics[Metric.TRAIN_LOSS]
        saved = self._saved == state.step or self.checkpoints.writer.finish()
        if saved and loss is not None:
            self._saved = state.step
        if loss is not None and not saved:
            raise StorageError(
                f"step {state.step}: the last checkpoint could not be saved in {self.experiment.run_path}, see the "
                "warning above; where the disk is the reason, make room or set run_dir, where a stage is missing, have "
                "a node of it; then start again to continue from the newest complete one"
            )
        has_other_plans = self.recoverable is not None and self.recoverable.has_other_plans
        if loss is not None and self.context.world_size > 1 and not has_other_plans:
            self.records.write_measured()
        if loss is not None and state.runner.rank == 0:
            say(state.memory.table())
        stopped = state.step < self._max_steps
        who = state.finished.stopped_by if stopped and state.finished is not None else None
        return self._summary(loss, stopped=stopped, stopped_by=who, saved=saved)

    def _stop_early(self, reason: str) -> TrainingSummary:
        """Save what was finished before the step that was given up; connections between ranks are closed."""
        step = self.state.step
        if step == self.state.first_step:
            raise StoppedError(f"step {step + 1}: {reason}; no step of this start is finished, nothing to save")
        logger.warning("step %d: %s; it is given up, and step %d saved", step + 1, reason, step)
        if not self.checkpoints.save_alone():
            raise StorageError(f"step {step}: the last checkpoint could not be saved, see the warning above")
        return self._summary(None, stopped=True, stopped_by=None, saved=True)

    def _summary(self, loss: float | None, *, stopped: bool, stopped_by: int | None, saved: bool) -> TrainingSummary:
        state, self._ended = self.state, True
        path = checkpoint_path(self.experiment.run_path, state.step) if saved else None
        return TrainingSummary(
            state.first_step, state.step, state.tokens, loss, stopped, stopped_by, path, state.runner.rank
        )

    def _complete_step(self, stop: StopSignal) -> None:
        """Validate, report and save what the last step has come to, as far as it is due; all ranks together."""
        state, writer = self.state, self.checkpoints.writer
        assert state.finished is not None
        metrics, stopped, stopped_by = state.finished[:3]
        if stopped:
            self._say_stopped(stop, stopped_by)
        if writer.blocked_s is not None:
            metrics[Metric.BLOCKED_S], writer.blocked_s = writer.blocked_s, None
        if self._due(self.experiment.evaluation.interval):
            metrics |= self._validate()
        self._owner.check_last_beat()
        self.context.check()
        self.records.write(metrics)
        if self._due(self.experiment.checkpoint.interval) or stopped or state.step >= self._max_steps:
            self._save()
        state.work_is_left = False

    def _between_steps(self) -> None:
        """Make a copy of the stage where it is due, and begin another epoch where it is wanted; all ranks together."""
        finished = self.state.finished
        assert finished is not None
        is_last = finished.stop or self.state.step >= self._max_steps
        if self._recovery is None or self.recoverable is None or is_last:
            return
        self.recoverable.copy_between_steps()
        if not finished.wants_epoch:
            paces = [reading.pace for reading in finished.nodes.values()]
            replanning = self._recovery.replanning
            replanning.observe(self.state.step, paces, self.records.trace.newest)
            self.records.board.link_paces = replanning.link_paces
            return
        self.checkpoints.writer.finish()  # what is being written belongs to ranks of the present epoch
        self._go_on("a node comes, or a plan is better", interrupted=False)

    def _go_on(self, reason: str, *, interrupted: bool) -> None:
        """Go on in another epoch."""
        if self._recovery is not None and self.recoverable is not None:
            self._recovery.go_on(self.recoverable, reason, interrupted=interrupted)

    def _complete_joining(self) -> None:
        """Wait until all who have come have the state of their stage; this one may be one of them."""
        if self._recovery is not None and self.recoverable is not None:
            self._recovery.complete_joining(self.recoverable)
            begun = self.state.begun
            self.state.begun = begun and begun._replace(lr=self.state.optimizer.lr)

    def _say_stopped(self, stop: StopSignal, rank: int | None) -> None:
        """Say on every rank why it ends now: each host has a log of its own."""
        who = f"{stop.name} to this rank" if stop.requested else "a signal to another rank"
        if rank is not None and not stop.requested:
            who = f"a signal to rank {rank} ({self.state.plans.main.nodes[rank]})"
        logger.warning("step %d: the run stops here, on all ranks, by %s", self.state.step, who)

    def _take_step(self, stop: StopSignal) -> StepTotals:
        """Take the step; called by the runner when all gradients are there."""
        if self._patience is not None:
            self._patience.commit()
        if self.recoverable is not None:
            self.recoverable.keep_for_others()
        wants_epoch = self._recovery is not None and self._recovery.wants_epoch
        return self._update.take(stop=stop.requested, wants_epoch=wants_epoch)

    def _validate(self) -> StepMetrics:
        self._faults.reached("VALIDATION", self.state.step)
        training = self.experiment.training
        num_microbatches = self.experiment.evaluation.batches * training.num_microbatches
        loss = self.state.runner.evaluate(
            lambda microbatch: self.order.validation_batch(microbatch, training.micro_batch_size), num_microbatches
        )
        return {Metric.VALIDATION_LOSS: loss, Metric.VALIDATION_PERPLEXITY: math.exp(min(loss, 700.0))}

    def _train_batch(self, microbatch: int) -> tuple[Tensor, Tensor]:
        if self._patience is not None:
            self._patience.check()
        training = self.experiment.training
        return self.order.batch(self.state.step, microbatch, training.num_microbatches, training.micro_batch_size)

    def _due(self, interval: int) -> bool:
        return interval > 0 and self.state.step % interval == 0

    def _save(self) -> None:
        step = self.state.step
        self._faults.reached("CHECKPOINT", step)
        missing = [] if self.recoverable is None else self.recoverable.missing_stages()
        if missing:
            if self.state.runner.rank == 0:
                words = "step %d: no checkpoint, as nobody has stage %d or a copy of it; start one of its nodes"
                logger.warning(words, step, missing[0])
            return
        on_all_ranks(self.context, Topic.OWNER, self._owner.check)
        self.context.check()
        self.records.write_trace()
        self.checkpoints.save()
