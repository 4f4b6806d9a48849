"""Makes the executors of one rank: which one a program gets, and what carries its messages."""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from skippipe.runtime.executors.dynamic_executor import PACE_TASKS, DynamicExecutor, PlannedTimes
from skippipe.runtime.executors.emulation import Emulation
from skippipe.runtime.executors.static_executor import Executor, ProgramClock, StaticExecutor
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.program.program import Program
from skippipe.runtime.program.readiness import TaskDependencies
from skippipe.runtime.ranks.groups import Channels, ProcessGroups
from skippipe.runtime.runner import Span
from skippipe.runtime.runner_options import RunnerOptions
from skippipe.runtime.stage_compute import StageCompute
from skippipe.runtime.transport.mailbox import NUM_NUMBERS, Mailbox
from skippipe.runtime.transport.message import CPU, MessageFormat
from skippipe.runtime.transport.transport import OrderedTransport, TaggedTransport, Transport
from skippipe_scheduler.plan.plan import Plan

UNFINISHED_SENDS_PER_RECEIVE = 4
"""Messages kept for slow peers, as a multiple of the receive window."""
RECEIVES_AHEAD = 4
"""Receives that the dynamic executor posts ahead for each peer and direction."""


@dataclass(frozen=True)
class RankPlan:
    """What one rank does under one plan of the run's set, and when."""

    plan: Plan
    program: Program
    times: PlannedTimes
    dependencies: TaskDependencies
    emulation: Emulation | None

    @classmethod
    def of(cls, plans: PlanSet, name: str, program: Program, options: RunnerOptions) -> "RankPlan":
        """Prepare what a rank does under the plan of that name, from its proved program."""
        emulated = options.emulation.links or options.emulation.compute
        plan, node = plans[name], program.node
        pace, link_pace = plans.pace.get(node, 1.0), plans.link_pace_from(node)
        emulation = Emulation(plan, node, options.emulation, pace, link_pace) if emulated else None
        return cls(plan, program, PlannedTimes.of(plan, program.node), TaskDependencies.of(program), emulation)


class ExecutorFactory:
    """The transports of one rank and the executors that use them; all ranks make and extend theirs together."""

    def __init__(
        self, rank: int, nodes: Sequence[str], options: RunnerOptions, groups: ProcessGroups, timeout_s: float
    ) -> None:
        self._nodes = nodes
        self._options = options
        self._timeout_s = timeout_s
        self._pace: deque[float] = deque(maxlen=PACE_TASKS)
        self._channels: Channels | None = None
        stamps = int(options.emulation.links or options.emulation.compute)
        max_unfinished = UNFINISHED_SENDS_PER_RECEIVE * options.receive_window
        self._transport: Transport
        if options.matching == "order":
            device = options.device if options.backend == "nccl" else CPU
            self._channels = Channels(rank, timeout_s, options.backend, device)
            messages = MessageFormat(options.wire, stamps, device)
            self._transport = OrderedTransport(rank, self._channels, messages, max_unfinished)
        else:
            self._transport = TaggedTransport(groups, MessageFormat(options.wire, stamps), max_unfinished)
        numbered = MessageFormat(options.wire, NUM_NUMBERS)
        self._mailbox = Mailbox(groups, numbered, receives_ahead=RECEIVES_AHEAD, max_unfinished=max_unfinished)

    def connect(self, programs: Sequence[Program]) -> None:
        """Open the channels that these programs need, where messages have channels."""
        if self._channels is not None:
            self._channels.extend(programs)

    def training(self, rank_plan: RankPlan, compute: StageCompute, zero_ns: int) -> Executor:
        """Return the executor of one iteration of a plan's program."""
        if self._options.executor == "static":
            return self.static(rank_plan.program, compute, rank_plan.emulation, zero_ns)
        return DynamicExecutor(
            ProgramClock(rank_plan.program, self._nodes, zero_ns),
            compute,
            self._mailbox,
            rank_plan.emulation,
            rank_plan.times,
            rank_plan.dependencies,
            memory=rank_plan.plan.costs.memory[rank_plan.program.node],
            stretch=statistics.median(self._pace) if self._pace else 1.0,
            timeout_s=self._timeout_s,
        )

    def static(
        self, program: Program, compute: StageCompute, emulation: Emulation | None, zero_ns: int
    ) -> StaticExecutor:
        """Return an executor of any program, in the order of its list."""
        # On NCCL a receive occupies the device until its peer comes: it is posted at its place, not ahead.
        window = 0 if self._options.backend == "nccl" else self._options.receive_window
        clock = ProgramClock(program, self._nodes, zero_ns)
        return StaticExecutor(clock, compute, self._transport, emulation, receive_window=window)

    def learn(self, rank_plan: RankPlan, spans: Sequence[Span]) -> None:
        """Take the pace of this rank from the tasks of an iteration."""
        self._pace.extend(rank_plan.times.ratios(spans))

    def abort(self) -> None:
        """Make every wait on the channels fail at once."""
        if self._channels is not None:
            self._channels.abort()

    def destroy(self) -> None:
        """Release the channels."""
        if self._channels is not None:
            self._channels.destroy()
