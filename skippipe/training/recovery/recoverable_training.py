"""The part of a trainer that brings it from one epoch into the next, with the state of its stage."""

from collections.abc import Callable, Sequence

from skippipe.checkpoint.disks.peer_files import PeerFiles
from skippipe.checkpoint.disks.run_disks import RunDisks, disks_of, named_disk
from skippipe.data.samples import SampleOrder
from skippipe.monitor.metrics import Metric, StepMetrics
from skippipe.monitor.run_events import RestoredStage
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.ranks.agreement import all_gather_json
from skippipe.runtime.ranks.store_names import Topic
from skippipe.runtime.runner_factory import make_runner_of_epoch, make_unconnected_runner
from skippipe.training.measurement.memory_report import estimate_memory
from skippipe.training.optimizer.settings import new_state
from skippipe.training.records.run_checkpoints import RunCheckpoints
from skippipe.training.records.run_records import RunRecords
from skippipe.training.recovery.progress import ProgressReport, Settlement
from skippipe.training.recovery.run_facts import TrainerFacts
from skippipe.training.recovery.run_recovery import FindState
from skippipe.training.recovery.stage_copies import StageCopies
from skippipe.training.recovery.stage_state import StageState
from skippipe.training.recovery.state_source import FoundState, WantedState
from skippipe.training.startup import Hardware
from skippipe.training.steps.step_totals import StepTotals
from skippipe.training.steps.step_update import StepUpdate
from skippipe.training.steps.training_state import TrainingState


class RecoverableTraining:
    """One process's training, as `RunRecovery` sees it; see `Recoverable` there."""

    def __init__(
        self,
        state: TrainingState,
        update: StepUpdate,
        records: RunRecords,
        checkpoints: RunCheckpoints,
        order: SampleOrder,
        hardware: Hardware,
        copies: StageCopies,
    ) -> None:
        self._state, self._update, self._records, self._checkpoints = state, update, records, checkpoints
        self._order, self._hardware, self._copies = order, hardware, copies
        self._device_types = dict(zip(state.plans.main.nodes, hardware.device_types, strict=False))
        self.lacks_state = False
        """Whether this process has nothing yet of its stage: it has come lately, or has taken it over."""
        self._has_moved = False
        self._is_new = False
        self._fetch: Callable[[], None] | None = None
        self._squared_norm = 0.0
        self.has_other_plans = False
        """Whether this is another epoch than the first."""
        self.restored: RestoredStage | None = None
        """From what this process has the stage, where that was older than what the others stood at."""

    def arrive(self) -> None:
        """Say that this process comes into a run under way."""
        self.lacks_state = self._is_new = True

    @property
    def plans(self) -> PlanSet:
        """Those of the present members."""
        return self._state.plans

    @property
    def stage(self) -> int:
        """The stage that this process holds."""
        (index,) = self._state.runner.stages
        return index

    def facts(self) -> TrainerFacts:
        """Say what the trainers of all members have in common."""
        return TrainerFacts(
            devices=self._hardware.devices,
            peak_tflop_per_s=self._hardware.peak_tflop_per_s,
            device_types=self._device_types,
            fingerprint=self._order.text.fingerprint,
            num_tokens=self._order.text.num_tokens,
            own_texts=self._order.text.of_nodes,
            wandb_id=self._records.wandb_id,
            disk_nonce=self.disks.nonce,
        )

    def progress(self) -> ProgressReport | None:
        """Say where this process stands."""
        state = self._state
        if self.lacks_state:
            return None
        left = state.work_is_left or self._checkpoints.writer.unconfirmed_step == state.step
        return ProgressReport(step=state.applied, contributed=state.contributed, totals=state.sums, work_is_left=left)

    def stage_state(self) -> StageState:
        """Return what is held of the stage."""
        state = self._state
        parameters = state.runner.stages[self.stage].state_dict_global()
        # What replicas share out is brought to who comes when all of them meet.
        optimizer = {} if state.optimizer.sharded else state.optimizer.state(state.runner.parameters())
        return StageState(state.step, state.elapsed_s, parameters, optimizer, squared_norm=self._squared_norm)

    def keep_for_others(self) -> None:
        """Note of the gradients what others need should this process be lost, before anybody takes the step."""
        state = self._state
        if "rebuild" in state.experiment.recovery.lost_stage:
            layers = state.runner.stages[self.stage].layers.parameters()
            self._squared_norm = state.optimizer.squared_norm(layers)
        self._copies.before_sum(state.step, self._state_with_gradients, state.context.check)

    def copy_between_steps(self) -> None:
        """Make a copy of the stage for others where it is due."""
        self._copies.between_steps(self._state.step, self.stage_state)

    def missing_stages(self) -> list[int]:
        """Return the stages of which no member has anything; all ranks call this together."""
        absent = self.plans.main.rules.absent_stages or ()
        if not absent:
            return []
        kept = all_gather_json(self._state.context, Topic.KEPT_STAGES, lambda: self._copies.kept_stages)
        return sorted(set(absent) - {stage for stages in kept for stage in stages})

    def leave_epoch(self) -> None:
        """Let go of all connections."""
        self._checkpoints.writer.abandon()
        if self._state.optimizer.resharing is not None:
            self._state.optimizer.resharing.leave()
        self._state.runner.abort()
        self._state.runner.close()

    def follow(self, settlement: Settlement, plans: PlanSet, find: FindState) -> None:
        """Take the last step that another one has taken, and count it, or change the stage."""
        state = self._state
        step, sums, work_is_left, standing = settlement
        index = plans.main.stage_of[state.node]
        if index != self.stage:
            self.lacks_state = self._has_moved = True
            state.change_stage(make_unconnected_runner(state.experiment, plans, index, state.context))
        self._fetch = None
        if self.lacks_state:
            if state.optimizer.resharing is not None:
                state.optimizer.resharing.lack_state(step)
            names = tuple(state.runner.stages[index].global_parameters())
            wanted = WantedState(index, names, plans.main, standing)
            self._fetch = lambda: self._take_stage_state(find(wanted), step, sums)
            if plans.joining is not None:
                self._stand_behind(step, 0.0)
                return
            self.take_state()
            if state.begun is None and work_is_left and sums is not None:
                # It takes part in what is still to be done behind that step.
                totals = StepTotals.of_sums(sums)
                metrics: StepMetrics = {Metric.STEP: step, Metric.TRAIN_LOSS: totals.loss}
                state.finished = totals.finished(metrics, {})._replace(stopped_by=None)
        if state.applied < step and sums is not None:
            self._update.apply(sums)
        if state.step < step and state.begun is not None and state.sums is not None:
            self._update.count(state.begun, StepTotals.of_sums(state.sums))
        state.work_is_left = work_is_left and state.finished is not None

    def take_state(self) -> None:
        """Fetch the state of the stage, where this process has come lately and has followed without it."""
        if self._fetch is not None:
            self._fetch()
            self._fetch = None

    @property
    def disks(self) -> RunDisks:
        """On which disks the run directory of the present members lies."""
        return self._state.disks

    def disk_name(self) -> str:
        """Return the name of the disk that this process sees: the same for all that see it."""
        return named_disk(self._state.experiment.run_path, self.disks.nonce)

    def enter_epoch(self, plans: PlanSet, disk_names: Sequence[str], peers: PeerFiles) -> None:
        """Connect to the others along new plans, on disks of these names by rank. All members call this together."""
        state = self._state
        state.disks = disks_of(disk_names, state.context.rank, self.disks.nonce)
        state.peers = None if state.disks.shared else peers
        experiment, context = state.experiment, state.context
        estimates = estimate_memory(experiment, plans, [self._device_types[node] for node in plans.main.nodes])
        state.memory = state.memory.of_ranks(estimates)
        self.has_other_plans = True
        state.runner = make_runner_of_epoch(experiment, plans, state.runner, context)
        state.runner.iteration = state.step
        self._share_out_state()
        self._checkpoints.connect()
        if state.finished is not None:
            state.finished = state.finished._replace(stopped_by=None)  # the rank of another one by now
        if state.disks.is_first:
            self._records.take_over_disk(self._order)
        if context.rank == 0:
            self._records.take_over()

    def _share_out_state(self) -> None:
        """Bring the optimizer's state to the present replicas, where these share it out."""
        state, resharing = self._state, self._state.optimizer.resharing
        if resharing is None:
            return
        lost = resharing.join(state.runner.replicas, state.runner.with_replicas)
        if lost and self.plans.main.stages[self.stage].nodes[0] == state.node:
            share = lost / sum(parameter.numel() for parameter in state.runner.parameters().values())
            place = f"its weights, with new optimizer state for {max(share, 0.01):.0%} of them"
            self.restored = RestoredStage(stage=self.stage, place=place, of_step=state.step)

    def _state_with_gradients(self) -> StageState:
        """Return what is held of the stage, and the gradients of the step that comes next."""
        parameters = self._state.runner.parameters().items()
        gradients = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
        return self.stage_state()._replace(gradients=gradients)

    def _take_stage_state(self, found: FoundState, step: int, sums: Sequence[float] | None) -> None:
        """Go on after `step` from a state of the stage; one of that step goes on bit by bit.

        One of the step before it that has the gradients takes the step by its `sums`.
        """
        state, held = self._state, found.state
        can_step = held.step == step - 1 and bool(held.gradients) and sums is not None
        stage = state.runner.stages[self.stage]
        stage.load_global(stage.adapters() | held.parameters)
        resharing = state.optimizer.resharing
        if resharing is not None and found.place == "a replica" and step and not held.optimizer:
            resharing.take_weights()
        else:
            # At step 0, as in the checkpoint of an import, there are weights alone.
            optimizer = held.optimizer if held.step else new_state(state.runner.parameters())
            state.optimizer.load(optimizer, step - can_step)
        if can_step and sums is not None:
            for name, parameter in state.runner.parameters().items():
                parameter.grad = held.gradients[name].to(parameter.device)
            self._update.update_weights(StepTotals.of_sums(sums))
        state.sums = None if sums is None else tuple(sums)
        self._stand_behind(step, held.elapsed_s)
        of_step = held.step + can_step
        if found.place != "a replica" and (self._has_moved or of_step < step):
            node = state.node if self._has_moved else None
            self.restored = RestoredStage(stage=self.stage, place=found.place, of_step=of_step, node=node)
        self.lacks_state = self._has_moved = self._is_new = False

    def _stand_behind(self, step: int, elapsed_s: float) -> None:
        """Stand where the others do."""
        self._state.applied = self._state.contributed = step
        if self._is_new:
            self._state.begin_after(step, elapsed_s)
            self._records.reported = step
