"""One rank's part of a set of plans, together with the other ranks."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from skippipe.errors import CommunicationError
from skippipe.model.stage import Stage
from skippipe.runtime.epochs.guards import WaitGuard, make_guard
from skippipe.runtime.executors.emulation import Emulation
from skippipe.runtime.executors.executor_factory import ExecutorFactory, RankPlan
from skippipe.runtime.executors.static_executor import Executor, run_without_gradients
from skippipe.runtime.gradients.collectives import DirectAllGather
from skippipe.runtime.gradients.operators import check_operators
from skippipe.runtime.gradients.reduction import visit_factor
from skippipe.runtime.gradients.stage_reduction import StageReduction
from skippipe.runtime.plans.plan_set import MAIN_PLAN, PlanSet
from skippipe.runtime.program.faults import Faults
from skippipe.runtime.program.program import Program, compile_evaluation, compile_programs
from skippipe.runtime.program.verifier import prove, prove_transfers
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.groups import ProcessGroups, create_groups
from skippipe.runtime.ranks.torch_errors import translating_errors
from skippipe.runtime.runner import BatchLoader, IterationResult, IterationTotals, Span, computing_s
from skippipe.runtime.runner_options import RunnerOptions
from skippipe.runtime.stage_compute import make_compute
from skippipe_scheduler.plan.plan import Plan

Result = TypeVar("Result")


class DistributedRunner:
    """Runs the programs of this rank's node.

    Raises `PeerLostError` where another rank stops, falls silent for longer than the timeout, or cannot be reached.
    """

    def __init__(
        self,
        plans: PlanSet,
        programs: Mapping[str, Program],
        stage: Stage,
        groups: ProcessGroups,
        options: RunnerOptions,
        context: DistributedContext,
    ) -> None:
        """Take this rank's proved programs, by the plan's name, and groups that are connected; see `connect`."""
        self.plans = plans
        self.rank = groups.rank
        self._nodes = plans.main.nodes
        self.node = self._nodes[self.rank]
        self.stage_index = plans.main.stage_of[self.node]
        self.stages = {self.stage_index: stage}
        self.iteration = 0
        self._executor: Executor | None = None
        self._closed = False
        self._closing = threading.Lock()
        self._options = options
        self._rank_plans = {name: RankPlan.of(plans, name, programs[name], options) for name in plans}
        self._planned_s = 0.0
        self._scales = {name: options.scales(plan, self.stage_index) for name, plan in plans.items()}
        self._evaluation_programs: dict[int, Program] = {}
        self._faults = Faults(options.emulation.faults, self.node)
        self._compute = make_compute(stage, plans, options, self._faults)
        self._groups = groups
        self._control = DirectAllGather(groups.control)
        self._reduction = StageReduction(self.stage_index, groups, options)
        self._executors = ExecutorFactory(self.rank, self._nodes, options, groups, context.timeout_s)
        self._guard: WaitGuard = make_guard(context, self._nodes, abort=self.abort, place=self._place)

    @classmethod
    def connect(cls, plans: Plan | PlanSet, stage: Stage, context: DistributedContext, options: RunnerOptions) -> Self:
        """Prove the programs of all plans and open the connections that they need. All ranks call this together.

        Raises `ProgramError` where a plan's programs cannot be proved, `ConfigError` where the back-end lacks an
        operator, and `PeerLostError`.
        """
        if context.store is None:
            raise CommunicationError("a distributed run needs a context that has met the other ranks")
        plans = PlanSet.of(plans)
        programs = {name: _proved_programs(plan, options) for name, plan in plans.items()}
        own = {name: of_ranks[context.rank] for name, of_ranks in programs.items()}
        groups = create_groups(plans.main, context.rank, context.timeout_s)
        runner = cls(plans, own, stage, groups, options, context)
        runner._open([program for of_ranks in programs.values() for program in of_ranks])
        return runner

    def _open(self, programs: Sequence[Program]) -> None:
        """Try what an iteration needs of the back-end, and open the channels of these programs."""
        gradient_dtype = self._options.gradient_dtype or self._options.dtype

        def open_all() -> None:
            check_operators(self._groups, self._options.wire.dtype, gradient_dtype)
            self._executors.connect(programs)

        self._guard.run(open_all)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of this rank's stage that are trained, under the names they are stored by."""
        return self.stages[self.stage_index].trained_parameters()

    def owned_parameters(self) -> dict[str, nn.Parameter]:
        """Return the stage's parameters on its first replica, nothing on the others."""
        return self.parameters() if self.plans.main.stages[self.stage_index].nodes[0] == self.node else {}

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        """The group of this stage's replicas; None where there is one."""
        return self._reduction.replicas

    def with_replicas(self, call: Callable[[], Result]) -> Result:
        """Call something that waits for the other replicas of this stage; see `Runner`."""
        return self._guard.run(lambda: self._reduction.with_replicas(call))

    def reduce_with(self, reduction: Callable[[float], None] | None) -> None:
        """Leave the reduction to the optimizer; see `Runner`."""
        self._reduction.by_optimizer = reduction

    def train_iteration(
        self,
        batch: BatchLoader,
        step: Callable[[], Result],
        plan: str = MAIN_PLAN,
        before_reduction: Callable[[], None] | None = None,
    ) -> IterationResult[Result]:
        """Run one iteration of a plan; see `Runner`."""
        rank_plan = self._rank_plans[plan]
        stage = self.stages[self.stage_index]
        stage.train()
        stage.zero_grad(set_to_none=True)
        self.iteration += 1
        split = rank_plan.plan.split_of[self.node]
        self._compute.reset(len(rank_plan.plan.microbatches), split, self.iteration - 1, self._scales[plan])
        return self._guard.run(lambda: self._train(rank_plan, batch, step, before_reduction))

    def _train(
        self,
        rank_plan: RankPlan,
        batch: BatchLoader,
        step: Callable[[], Result],
        before_reduction: Callable[[], None] | None,
    ) -> IterationResult[Result]:
        self._planned_s = rank_plan.times.busy_s
        zero_ns = self._agree_on_zero(rank_plan.emulation)
        self._reduction.expect(self.parameters().values())
        self._executor = executor = self._executors.training(rank_plan, self._compute, zero_ns)

        def reduce() -> None:
            if before_reduction is not None:
                before_reduction()
            self._reduce(rank_plan, executor, zero_ns)

        executor.run(batch, reduce)
        step_result = executor.finish(step)
        self._executors.learn(rank_plan, executor.spans)
        duration_s = (time.monotonic_ns() - zero_ns) * 1e-9
        totals = self.tally()
        return IterationResult(totals.loss, duration_s, totals.busy_s, executor.spans, executor.waits, step_result)

    def tally(self) -> IterationTotals:
        """Return loss and busy time of the iteration; see `Runner`."""
        spans = self._executor.spans if self._executor is not None else ()
        busy_s = computing_s(spans)
        pace = busy_s / self._planned_s if self._planned_s > 0 else 0.0
        waits = self._executor.waits if self._executor is not None else ()
        waiting_s = sum(wait.end_s - wait.start_s for wait in waits)
        return IterationTotals(self._compute.loss_sum, busy_s, self._compute.exit_loss_sum, pace, waiting_s)

    def evaluate(self, batch: BatchLoader, num_microbatches: int) -> float:
        """Return the mean loss at full depth; see `Runner`. Links and tasks are not emulated here."""
        if num_microbatches not in self._evaluation_programs:
            programs = compile_evaluation(self.plans.main, self._options.activation_bytes, num_microbatches)
            prove_transfers(programs)
            self._guard.run(lambda: self._executors.connect(programs))
            self._evaluation_programs[num_microbatches] = programs[self.rank]
        program = self._evaluation_programs[num_microbatches]
        self.stages[self.stage_index].eval()
        self._compute.reset(num_microbatches)
        self._executor = executor = self._executors.static(program, self._compute, None, time.monotonic_ns())
        self._guard.run(lambda: run_without_gradients(executor, batch))
        return self.sum_over_ranks([self._compute.loss_sum])[0]

    def sum_over_ranks(self, values: Sequence[float], own: Sequence[float] = ()) -> list[float]:
        """Return the sums over all ranks; see `Runner`."""
        row = torch.tensor([*values, *own], dtype=torch.float64)
        rows = self._guard.run(lambda: self._all_gather("waited for the sum over ranks", row))  # (R, n)
        return [*rows[:, : len(values)].sum(0).tolist(), *rows[:, len(values) :].flatten().tolist()]

    def abort(self) -> None:
        """Make every wait for other ranks fail; see `Runner`. Any thread may call it, at any time."""
        with self._closing:
            if not self._closed:
                self._groups.abort()
                self._executors.abort()

    def barrier(self) -> None:
        """Wait for all ranks."""
        action, group = "waited for all ranks at a barrier", self._groups.control
        self._guard.run(lambda: translating_errors(action, self._others, lambda: dist.barrier(group)))

    def close(self) -> None:
        """Release the process groups of these plans; all ranks together. Safe to call twice; the context stays open."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._executors.destroy()
                self._groups.destroy()
                # Sockets and threads of a group live as long as anything refers to it, and this object may live on.
                del self._control, self._reduction, self._executors, self._executor, self._groups

    def _agree_on_zero(self, emulation: Emulation | None) -> int:
        """Return the iteration's beginning on this rank's clock; with emulated links, the same number on all ranks.

        On real links each rank begins when it hears of it: nobody can have sent anything at an earlier time. Where
        nothing is emulated nobody waits. A rank may begin while others are still in the iteration before: gloo matches
        equal tags of a pair in the order of their posts, which is the same on both sides, and tags change with the
        iteration; nobody gets further ahead than STEP, where all ranks meet.
        """
        if emulation is None:
            return time.monotonic_ns()
        own = torch.tensor([time.monotonic_ns()])
        latest = self._all_gather("waited for the start of the iteration", own).amax()  # of (R, 1)
        zero_ns = int(latest) if self._options.emulation.links else time.monotonic_ns()
        emulation.start_iteration(zero_ns, self.iteration)
        return zero_ns

    def _reduce(self, rank_plan: RankPlan, executor: Executor, zero_ns: int) -> None:
        """Sum the stage's gradients over its replicas and scale them."""
        self._faults.reached("REDUCE", self.iteration)
        plan, emulation = rank_plan.plan, rank_plan.emulation
        start_ns = time.monotonic_ns()
        if emulation is not None and self._options.emulation.links:
            start_ns = self._reduction.latest_ns(emulation.end_ns)
        visits = plan.visits[self.stage_index]
        factor = visit_factor(self._options.gradient_normalization, len(plan.microbatches), visits)
        self._reduction.run(self.parameters().values(), factor)
        end_ns = time.monotonic_ns() if emulation is None else emulation.finish_reduction(start_ns)
        if self.replicas is not None:
            executor.spans.append(Span(self.node, "REDUCE", -1, (start_ns - zero_ns) * 1e-9, (end_ns - zero_ns) * 1e-9))

    def _all_gather(self, action: str, own: Tensor) -> Tensor:
        """Return what every rank gives (n,), in the order of ranks (R, n): sums of it are the same on each."""
        return translating_errors(action, self._others, lambda: self._control.all_gather(own))

    @property
    def _others(self) -> tuple[int, ...]:
        return tuple(rank for rank in range(len(self._nodes)) if rank != self.rank)

    def _place(self) -> str:
        at = f", {self._executor.current}" if self._executor is not None and self._executor.current is not None else ""
        return f"step {self.iteration}{at}"


def _proved_programs(plan: Plan, options: RunnerOptions) -> tuple[Program, ...]:
    """Return the programs of all ranks."""
    programs = compile_programs(plan, options.activation_bytes)
    prove(programs, plan)
    return programs
