"""What is kept of the steps of a run: on one rank metrics, monitors and tables, on every rank a trace."""

import logging
from pathlib import Path

from skippipe.checkpoint.disks.gathering import SLOWEST_BYTES_PER_S
from skippipe.cluster.measured import write_measured
from skippipe.data.kept_tokenizer import TOKENIZER, keep_tokenizer, packed_tokenizer, unpack_tokenizer
from skippipe.data.samples import SampleOrder
from skippipe.errors import SkipPipeError
from skippipe.model.architecture import attention_in_use
from skippipe.monitor.console import ParameterCounts, further_line, start_table
from skippipe.monitor.live.node_board import NodeBoard
from skippipe.monitor.metrics import Metric, StepMetrics
from skippipe.monitor.sinks import Reporter, open_reporter
from skippipe.monitor.storage_watch import StorageWatch
from skippipe.monitor.terminal import say
from skippipe.monitor.wandb_place import WandbPlace
from skippipe.monitor.wandb_run import wandb_id
from skippipe.planning.measured_for import experiment_measured_for
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.ranks.agreement import all_gather_json, on_all_ranks
from skippipe.runtime.ranks.store_names import Topic
from skippipe.training.measurement.step_trace import TraceRecorder
from skippipe.training.records.collecting import TRACES, bring_records
from skippipe.training.records.planned_status import planned_links, planned_nodes
from skippipe.training.run_directory import check_nothing_beyond, record_inputs
from skippipe.training.run_owner import RunOwner
from skippipe.training.startup import Hardware
from skippipe.training.steps.training_state import TrainingState

logger = logging.getLogger(__name__)


class RunRecords:
    """The records of one process; metrics and monitors are open on one rank, and on others take nothing."""

    def __init__(self, state: TrainingState, owner: RunOwner) -> None:
        self._state, self._owner = state, owner
        self._experiment, self._run_dir = state.experiment, state.experiment.run_path
        self.wandb_id: str | None = None
        self.trace = TraceRecorder(self._run_dir, state.context.rank)
        self.reported = 0
        """The last step that the reporter was given."""
        self.board = NodeBoard()
        self._board_plans: PlanSet | None = None
        self._reporter = Reporter()
        self._keeps_metrics = False
        self._storage = StorageWatch(self._experiment.checkpoint.timeout_s)

    def open_disk(self, order: SampleOrder) -> None:
        """Write config.yaml and the plans once on each disk, and the tokenizer where a process of it reads text.

        A run with no step left keeps those that it was trained with.
        """
        state = self._state
        is_done = state.step >= self._experiment.training.max_steps and (self._run_dir / "config.yaml").exists()
        if state.disks.is_first:
            check_nothing_beyond(self._experiment, state.step)
            if not is_done:
                record_inputs(self._experiment, state.plans, state.disks.nonce)
        if order.is_read and state.context.rank == next(iter(self._readers(state.disks.own)), None):
            keep_tokenizer(self._experiment.data, order.cache.tokenizer, self._run_dir, anew=not state.step)

    def spread_tokenizer(self) -> None:
        """Bring the tokenizer to disks none of whose processes reads text; all ranks call this together."""
        state = self._state
        peers = state.peers
        if peers is None:
            return
        giver, lacks = self._readers()[0], state.disks.is_first and not self._readers(state.disks.own)
        name = f"start/{TOKENIZER}"

        def pack() -> int:
            content = packed_tokenizer(self._experiment.data, self._run_dir)
            peers.offer(name, lambda: content)
            return len(content)

        def take() -> None:
            unpack_tokenizer(peers.fetch(giver, name), self._run_dir, anew=not state.step)

        size = all_gather_json(state.context, Topic.TOKENIZER, lambda: pack() if state.context.rank == giver else 0)
        limit_s = state.context.timeout_s + size[giver] / SLOWEST_BYTES_PER_S
        on_all_ranks(state.context, Topic.TOKENIZER, take if lacks else lambda: None, limit_s=limit_s)
        peers.withdraw([name])

    def _readers(self, disk: int | None = None) -> list[int]:
        """Return the ranks that begin microbatches, of one disk or of all."""
        plan, of_rank = self._state.plans.main, self._state.disks.of_rank
        if len(of_rank) == 1:
            return [0]
        readers = [plan.rank_of[node] for node in plan.stages[0].nodes]
        return [rank for rank in readers if disk in (None, of_rank[rank])]

    def open(self, hardware: Hardware, counts: ParameterCounts, invitation: str | None) -> str | None:
        """Print the start table, open metrics.jsonl and the monitors, on rank 0; return the id of the W&B run."""
        state, experiment, logging_options = self._state, self._experiment, self._experiment.logging
        self.wandb_id = wandb_id(self._run_dir, logging_options.wandb, self.wandb_id)
        say(start_table(state.plans.main, counts, state.context.world_size))
        for name, plan in state.plans.further.items():
            say(further_line(name, plan))
        attention = attention_in_use(next(iter(state.runner.stages.values())).body.config)
        say(f"computing on {hardware.devices} in {experiment.training.dtype}, attention {attention}")
        say(state.memory.table())
        if not state.disks.shared:
            say(f"{len(state.disks.firsts)} disks have a part of {self._run_dir} each: every file lies on two of them")
        if invitation is not None:
            say(invitation)
        say(str(WandbPlace.of(logging_options.wandb, self._run_dir)))
        if state.step:
            say(f"continuing after step {state.step}")
        self._reporter, self._keeps_metrics = self._open_reporter(state.step), True
        return self.wandb_id

    def take_over_disk(self, order: SampleOrder) -> None:
        """Own the run directory from now on, in place of a process that is lost, or on a disk that has come."""
        self._owner.take_over()
        if not (self._run_dir / "config.yaml").exists():
            self.open_disk(order)

    def take_over(self) -> None:
        """Write the metrics from now on, in place of a process that is lost; it may not have written the last step."""
        if self._keeps_metrics:
            return
        state = self._state
        self._keeps_metrics = True
        self.reported = state.step - (state.finished is not None)
        self._reporter = self._open_reporter(self.reported)
        if state.finished is not None and not state.work_is_left:
            self.write(state.finished.metrics)

    def write(self, metrics: StepMetrics) -> None:
        """Report a step, unless that is done, or the others may have gone on without this process."""
        step = int(metrics[Metric.STEP])
        if self.reported < step and self._state.context.may_write:
            if self._keeps_metrics:
                self._observe(metrics)
            with self._storage.writing(self._run_dir / "metrics.jsonl"):
                self._reporter.write(metrics)
        self.reported = step

    def _observe(self, metrics: StepMetrics) -> None:
        """Tell the board what the nodes did in the step that is counted last."""
        state = self._state
        if self._board_plans is not state.plans:
            self._board_plans = state.plans
            nodes = planned_nodes(state.memory.estimates, tuple(sorted(state.runner.stages)))
            links = planned_links(state.plans.main) if state.context.world_size > 1 else ()
            self.board.begin_plan(state.plans.main.hash, nodes, links)
        if state.finished is not None:
            self.board.observe(metrics[Metric.ITERATION_S], state.finished.nodes)

    def write_trace(self) -> None:
        """Write this rank's trace, and on rank 0 the table of memory; a failure is logged."""
        try:
            with self._storage.writing(self._run_dir / "trace"):
                self.trace.write(self._state.context.check)
                if self._state.runner.rank == 0:
                    self._state.memory.write(self._run_dir, self._state.context.check)
        except SkipPipeError as reason:
            logger.warning("step %d: %s", self._state.step, reason)

    def write_measured(self) -> None:
        """Write what tasks and transfers took, on rank 0, once every rank has written its trace."""
        state = self._state
        state.runner.barrier()
        if state.peers is not None:
            bring_records(self._run_dir, state.context, state.disks, state.peers, TRACES)
        if state.runner.rank == 0:
            try:
                plan = state.plans.main
                measured_for = experiment_measured_for(self._experiment, len(plan.stages))
                write_measured(self._run_dir, plan, Path(self._experiment.cluster), measured_for)
            except SkipPipeError as reason:
                logger.warning("measured.yaml is not written: %s", reason)

    def _open_reporter(self, step: int) -> Reporter:
        return open_reporter(self._experiment, step, self.wandb_id, self.board, whole=self._state.disks.shared)

    def close(self) -> None:
        """Close metrics and monitors."""
        self._storage.close()
        self._reporter.close()
