"""One rank's part of a set of plans over gloo."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from skippipe.errors import CommunicationError, PeerLostError
from skippipe.model.stage import Stage
from skippipe.plans.plan_set import MAIN_PLAN, PlanSet
from skippipe.runtime.executors.emulation import Emulation
from skippipe.runtime.executors.executor_factory import ExecutorFactory, RankPlan
from skippipe.runtime.executors.static_executor import Executor, run_without_gradients
from skippipe.runtime.gradients.collectives import DirectAllGather
from skippipe.runtime.gradients.compression import make_bucket_sum
from skippipe.runtime.gradients.reduction import (
    all_reduce_over_replicas,
    expect_sums,
    fill_missing,
    scale,
    visit_factor,
)
from skippipe.runtime.operators import check_operators
from skippipe.runtime.program.program import Program, compile_evaluation, compile_programs
from skippipe.runtime.program.verifier import prove, prove_transfers
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.failure import FailureBoard
from skippipe.runtime.ranks.groups import create_groups
from skippipe.runtime.ranks.torch_errors import TransferError, translating_errors
from skippipe.runtime.runner import BatchLoader, IterationResult, IterationTotals, Span
from skippipe.runtime.runner_options import RunnerOptions
from skippipe.runtime.stage_compute import make_compute
from skippipe_scheduler.plan.plan import Plan

logger = logging.getLogger(__name__)
Outcome = TypeVar("Outcome")


class DistributedRunner:
    """Runs the programs of this rank's node. All ranks create and close their runners together.

    Raises `ProgramError` where a plan's programs cannot be proved; afterwards `PeerLostError` where another rank
    stops, falls silent for longer than the timeout, or cannot be reached.
    """

    def __init__(
        self, plans: Plan | PlanSet, stage: Stage, context: DistributedContext, options: RunnerOptions
    ) -> None:
        if context.store is None:
            raise CommunicationError("a distributed run needs a context that has met the other ranks")
        self.plans = PlanSet.of(plans)
        self._stages = self.plans.main.stages
        self._nodes = self.plans.main.nodes
        self.rank = context.rank
        self.node = self._nodes[self.rank]
        self.stage_index = self.plans.main.stage_of[self.node]
        self.stages = {self.stage_index: stage}
        self.iteration = 0
        self._executor: Executor | None = None
        self._options = options
        programs = {name: self._compile(plan) for name, plan in self.plans.items()}
        self._courses = {
            name: RankPlan.of(plan, programs[name][self.rank], options) for name, plan in self.plans.items()
        }
        self._evaluation_programs: dict[int, Program] = {}
        self._compute = make_compute(stage, self.plans, options)
        self._board = FailureBoard(context.store, self.rank, self._nodes)
        self._groups = create_groups(self.plans.main, self.rank, context.timeout_s)
        self._meeting = DirectAllGather(self._groups.control)
        self._bucket_sum = None if self._groups.replicas is None else make_bucket_sum(self._groups.replicas, options)
        self._reduction: Callable[[float], None] | None = None
        self._executors = ExecutorFactory(self.rank, self._nodes, options, self._groups, context.timeout_s)
        self._protected(lambda: self._connect([program for ranks in programs.values() for program in ranks]))

    def _compile(self, plan: Plan) -> tuple[Program, ...]:
        """Return the proved programs of all ranks."""
        programs = compile_programs(plan, self._options.activation_bytes)
        prove(programs, plan)
        return programs

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of this rank's stage under their Hugging Face names."""
        return self.stages[self.stage_index].global_parameters()

    def owned_parameters(self) -> dict[str, nn.Parameter]:
        """Return the stage's parameters on its first replica, nothing on the others."""
        return self.parameters() if self._stages[self.stage_index].nodes[0] == self.node else {}

    def train_iteration(self, batch: BatchLoader, step: Callable[[], None], plan: str = MAIN_PLAN) -> IterationResult:
        """Run one iteration of a plan; see `Runner`."""
        walked, course = self.plans[plan], self._courses[plan]
        stage = self.stages[self.stage_index]
        stage.train()
        stage.zero_grad(set_to_none=True)
        self.iteration += 1
        self._compute.reset(len(walked.microbatches), walked.split_of[self.node], self.iteration - 1)
        return self._protected(lambda: self._train(course, batch, step))

    def _train(self, course: RankPlan, batch: BatchLoader, step: Callable[[], None]) -> IterationResult:
        zero_ns = self._agree_on_zero(course.emulation)
        if self._bucket_sum is not None and self._reduction is None:
            expect_sums(self.parameters().values(), self._bucket_sum)
        self._executor = executor = self._executors.training(course, self._compute, zero_ns)
        executor.run(batch, lambda: self._reduce(course, executor, zero_ns), step)
        self._executors.learn(course, executor.spans)
        duration_s = (time.monotonic_ns() - zero_ns) * 1e-9
        loss, busy_s, _ = self.tally()
        return IterationResult(loss, duration_s, busy_s, executor.spans, executor.waits)

    def tally(self) -> IterationTotals:
        """Return loss and busy time of the iteration; see `Runner`."""
        spans = self._executor.spans if self._executor is not None else ()
        busy_s = sum(span.end_s - span.start_s for span in spans if span.microbatch >= 0)
        return IterationTotals(self._compute.loss_sum, busy_s, self._compute.exit_loss_sum)

    def evaluate(self, batch: BatchLoader, num_microbatches: int) -> float:
        """Return the mean loss at full depth; see `Runner`. Links and tasks are not emulated here."""
        if num_microbatches not in self._evaluation_programs:
            programs = compile_evaluation(self.plans.main, self._options.activation_bytes, num_microbatches)
            prove_transfers(programs)
            self._protected(lambda: self._executors.connect(programs))
            self._evaluation_programs[num_microbatches] = programs[self.rank]
        program = self._evaluation_programs[num_microbatches]
        self.stages[self.stage_index].eval()
        self._compute.reset(num_microbatches)
        self._executor = executor = self._executors.static(program, self._compute, None, time.monotonic_ns())
        self._protected(lambda: run_without_gradients(executor, batch))
        return self.sum_over_ranks([self._compute.loss_sum])[0]

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all ranks; see `Runner`."""
        tensor = torch.tensor(values, dtype=torch.float64)
        self._protected(lambda: self._control("waited for the sum over ranks", tensor, dist.ReduceOp.SUM))
        return [float(value) for value in tensor]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._protected(self._barrier)

    def close(self) -> None:
        """Release the process groups of these plans; all ranks together. The context stays open."""
        self._executors.destroy()
        self._groups.destroy()

    def _connect(self, programs: Sequence[Program]) -> None:
        check_operators(self._groups, self._options.wire.dtype, self._gradient_dtype)
        self._executors.connect(programs)

    def _agree_on_zero(self, emulation: Emulation | None) -> int:
        """Return the iteration's beginning on this rank's clock; with emulated links, the same number on all ranks.

        On real links each rank begins when it hears of it: nobody can have sent anything at an earlier time. Where
        nothing is emulated nobody waits. A rank may begin while others are still in the iteration before: gloo matches
        equal tags of a pair in the order of their posts, which is the same on both sides, and tags change with the
        iteration; nobody gets further ahead than STEP, where all ranks meet.
        """
        if emulation is None:
            return time.monotonic_ns()
        latest = torch.tensor([time.monotonic_ns()])
        self._control("waited for the start of the iteration", latest, dist.ReduceOp.MAX)
        zero_ns = int(latest) if self._options.emulation.links else time.monotonic_ns()
        emulation.start_iteration(zero_ns, self.iteration)
        return zero_ns

    def _reduce(self, course: RankPlan, executor: Executor, zero_ns: int) -> None:
        """Sum the stage's gradients over its replicas and scale them."""
        start_ns = time.monotonic_ns()
        if course.emulation is not None and self._options.emulation.links:
            entered = torch.tensor([course.emulation.end_ns])
            if self._groups.replicas is not None:
                self._over_replicas(entered, dist.ReduceOp.MAX)
            start_ns = int(entered)
        factor = visit_factor(
            self._options.gradient_normalization,
            len(course.plan.microbatches),
            course.plan.visits[self.stage_index],
        )
        fill_missing(self.parameters().values())
        self.with_replicas(lambda: (self._reduction or self._sum_gradients)(factor))
        end_ns = time.monotonic_ns()
        if course.emulation is not None:
            end_ns = course.emulation.finish_reduction(start_ns)
        if self._groups.replicas is not None:
            executor.spans.append(Span(self.node, "REDUCE", -1, (start_ns - zero_ns) * 1e-9, (end_ns - zero_ns) * 1e-9))

    def reduce_with(self, reduction: Callable[[float], None] | None) -> None:
        """Leave the reduction to the optimizer; see `Runner`."""
        self._reduction = reduction

    def _sum_gradients(self, factor: float) -> None:
        """Sum gradients over the stage's replicas in place and scale them; sums are made in fp32."""
        gradients = fill_missing(self.parameters().values())
        if self._bucket_sum is not None:
            all_reduce_over_replicas(gradients, self._bucket_sum)
        scale(gradients, factor)

    @property
    def _gradient_dtype(self) -> torch.dtype:
        """The dtype of gradients on their way between replicas."""
        return self._options.gradient_dtype or self._options.dtype

    def _over_replicas(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        self.with_replicas(lambda: dist.all_reduce(tensor, op=operation, group=self._groups.replicas))

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        """The group of this stage's replicas; None where there is one."""
        return self._groups.replicas

    def with_replicas(self, call: Callable[[], object]) -> None:
        """Call something that waits for the other replicas of this stage; see `Runner`."""
        others = tuple(rank for rank in self._groups.replica_ranks if rank != self.rank)
        translating_errors(f"waited for the other replicas of stage {self.stage_index}", others, call)

    def _control(self, action: str, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        """Reduce `tensor` (n,) over all ranks in place, in the order of ranks: the result is the same on each.

        Every rank sends to every other at once, which on slow links takes the longest latency once; a ring, which is
        what gloo's all-reduce is, takes one for each rank, twice.
        """
        said: Tensor = translating_errors(action, self._others, lambda: self._meeting.hear(tensor))  # (R, n)
        tensor.copy_(said.sum(0) if operation == dist.ReduceOp.SUM else said.amax(0))

    def _barrier(self) -> None:
        group = self._groups.control
        translating_errors("waited for all ranks at a barrier", self._others, lambda: dist.barrier(group))

    @property
    def _others(self) -> tuple[int, ...]:
        return tuple(rank for rank in range(len(self._nodes)) if rank != self.rank)

    def _protected(self, call: Callable[[], Outcome]) -> Outcome:
        """Call; where it fails, tell the other ranks why and wake those that wait for this one."""
        lost: TransferError | None = None
        try:
            return call()
        except PeerLostError:
            raise  # a collective inside the call has told the others already
        except TransferError as error:
            lost = error.with_traceback(None)
        except Exception as error:
            self._board.report(f"{type(error).__name__}: {error}", (), self._place)
            self._poison()
            self._say_who_waits()
            self._board.leave()
            raise
        self._board.report(str(lost), lost.peers, self._place)
        self._poison()
        message = self._message(lost)
        self._say_who_waits()
        self._board.leave()
        raise PeerLostError(message)

    def _poison(self) -> None:
        self._groups.poison()
        self._executors.poison()

    def _say_who_waits(self) -> None:
        if self.rank == 0:
            logger.error("%s", self._board.table())

    @property
    def _place(self) -> str:
        at = f", {self._executor.current}" if self._executor is not None and self._executor.current is not None else ""
        return f"step {self.iteration}{at}"

    def _message(self, lost: TransferError) -> str:
        names = ", ".join(self._nodes[rank] for rank in lost.peers[:3])
        more = ", ..." if len(lost.peers) > 3 else ""
        cause = self._board.root_cause(lost.peers) or lost.cause
        return (
            f"rank {self.rank} ({self.node}) {lost.action} ({names}{more}) in vain; {cause} "
            f"[{self._place}]; the run can be continued from its last checkpoint"
        )
