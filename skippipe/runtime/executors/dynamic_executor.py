"""The dynamic executor: the plan's tasks, in an order that gives way to what has arrived.

A rank does the plan's next task when its input is there. When that task is late, the rank does not stand still but
takes the first task in planned order that is ready and fits in memory (`readiness`, where it is argued that memory
stays within the plan and that nothing can wait for ever). Late means: its planned start is past by `PATIENCE` of a
forward. Before, the rank waits, because a planner that left a gap there had a reason; without jitter this
executor therefore does what the static one does. Where the machine is slower than the plan throughout, planned times
are stretched by the median ratio of this rank's last `PACE_TASKS` tasks, which jitter does not move.

Sums of gradients are made in the order in which microbatches come, so results are the static executor's to rounding.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from skippipe.runtime.executors.emulation import Emulation
from skippipe.runtime.executors.static_executor import ProgramClock, Result
from skippipe.runtime.program.program import OPERATION_OF_OPCODE, Instruction, Opcode, Program
from skippipe.runtime.program.readiness import ReadyTasks, TaskDependencies
from skippipe.runtime.ranks.torch_errors import TransferError
from skippipe.runtime.runner import BatchLoader, Span, TransferWait
from skippipe.runtime.stage_compute import StageCompute
from skippipe.runtime.transport.mailbox import Letter, Mailbox
from skippipe.runtime.transport.transport import describe_instruction
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.simulate import simulate

PATIENCE = 0.25
"""How late the plan's next task may be, in forwards of this node, before another one is taken."""
PACE_TASKS = 400


@dataclass(frozen=True)
class PlannedTimes:
    """When this rank's tasks start and how long they take, by plan."""

    start_s: Mapping[tuple[str, int], float]
    duration_s: Mapping[tuple[str, int], float]
    patience_s: float

    @classmethod
    def of(cls, plan: Plan, node: str) -> "PlannedTimes":
        """Return the times of one node."""
        tasks = {(str(span.operation), span.microbatch): span for span in simulate(plan).tasks if span.node == node}
        return cls(
            {key: span.start_s for key, span in tasks.items()},
            {key: span.end_s - span.start_s for key, span in tasks.items()},
            PATIENCE * plan.costs.forward_s[node],
        )

    @property
    def busy_s(self) -> float:
        """How long all of them take together."""
        return sum(self.duration_s.values())

    def due_s(self, task: Instruction, stretch: float) -> float:
        """Return from when on a task is late."""
        return stretch * (self.start_s[OPERATION_OF_OPCODE[task.opcode], task.microbatch] + self.patience_s)

    def ratios(self, spans: Sequence[Span]) -> list[float]:
        """Return measured over planned duration of each task."""
        planned_s = [self.duration_s.get((span.operation, span.microbatch), 0.0) for span in spans]
        return [(span.end_s - span.start_s) / s for span, s in zip(spans, planned_s, strict=True) if s > 0]


class Inbox:
    """Letters by the RECV that they answer; the computing thread waits here."""

    def __init__(self, program: Program) -> None:
        self.receive_of = {receive.tag: receive for receive in program.select(Opcode.RECV)}
        self.missing = dict(self.receive_of)
        self._letters: list[Letter] = []
        self._changed = threading.Condition()

    @property
    def expected(self) -> Counter[tuple[int, Any]]:
        """How many messages come from each peer in each direction."""
        return Counter((receive.peer, receive.direction) for receive in self.receive_of.values())

    def deliver(self, letter: Letter) -> None:
        """Take a letter from a listening thread."""
        with self._changed:
            self._letters.append(letter)
            self._changed.notify()

    def collect(self, wait_s: float) -> list[Letter]:
        """Return what has come since the last call; where there is nothing, wait for it, `wait_s` at most.

        Raises `TransferError` where a peer is lost.
        """
        with self._changed:
            if not self._letters and wait_s > 0:
                self._changed.wait(wait_s)
            letters, self._letters = self._letters, []
        for letter in letters:
            if letter.failure:
                sender = letter.peer, letter.direction
                awaited = next(
                    receive for receive in self.missing.values() if (receive.peer, receive.direction) == sender
                )
                raise TransferError(describe_instruction(awaited), (letter.peer,), letter.failure)
            del self.missing[letter.tag]
        return letters


class DynamicExecutor:
    """Runs a training program once, in an order of its own."""

    def __init__(
        self,
        clock: ProgramClock,
        compute: StageCompute,
        mailbox: Mailbox,
        emulation: Emulation | None,
        times: PlannedTimes,
        dependencies: TaskDependencies,
        *,
        memory: int,
        stretch: float,
        timeout_s: float,
    ) -> None:
        self.current: Instruction | None = None
        self.spans: list[Span] = []
        self.waits: list[TransferWait] = []
        self._clock = clock
        self._compute = compute
        self._mailbox = mailbox
        self._emulation = emulation
        self._times = times
        self._stretch = stretch
        self._timeout_s = timeout_s
        self._dependencies = dependencies
        self._tasks = ReadyTasks(clock.program, dependencies, memory)
        self._inbox = Inbox(clock.program)
        self._early: list[tuple[int, Instruction]] = []
        self._inputs: dict[Instruction, tuple[Instruction, Tensor, int]] = {}

    def run(self, batch: BatchLoader, reduce: Callable[[], None]) -> None:
        """Execute all tasks, then REDUCE; see `Executor`."""
        self._mailbox.listen(self._inbox.expected, self._inbox.deliver)
        while len(self._tasks):
            task, from_ns = self._next()
            self.current = task
            if task in self._dependencies.loads:
                self._compute.load(task.microbatch, *batch(task.microbatch))
            self._run_task(task, from_ns)
        (self.current,) = self._clock.program.select(Opcode.REDUCE)
        reduce()

    def finish(self, step: Callable[[], Result]) -> Result:
        """Step; see `Executor`."""
        (self.current,) = self._clock.program.select(Opcode.STEP)
        result = step()
        self._mailbox.finish_sends()
        return result

    def _next(self) -> tuple[Instruction, int]:
        """Wait for a task that may run; return it and the time at which that was decided."""
        free_ns = time.monotonic_ns() if self._emulation is None else self._emulation.wait_until_free()
        heard_ns = time.monotonic_ns()
        self._collect(0.0)
        while True:
            now_ns = time.monotonic_ns()
            self._admit(now_ns)
            head = self._tasks.head
            due_ns = self._clock.zero_ns + round(self._times.due_s(head, self._stretch) * 1e9)
            head_ready = self._tasks.is_ready(head)
            if head_ready or now_ns >= due_ns:
                task = self._tasks.take()
                if task is not None:
                    self._note_wait(task, free_ns)
                    return task, free_ns if head_ready else max(free_ns, due_ns)
            self.current = self._dependencies.receive_of.get(head, head)
            alarms_ns = [heard_ns + round(self._timeout_s * 1e9), *(at_ns for at_ns, _ in self._early)]
            if now_ns < due_ns:
                alarms_ns.append(due_ns)
            if self._collect((min(alarms_ns) - now_ns) * 1e-9):
                heard_ns = time.monotonic_ns()
            elif time.monotonic_ns() - heard_ns > self._timeout_s * 1e9 and not self._early:
                self._give_up(head)

    def _collect(self, wait_s: float) -> bool:
        """Take over what has come; return whether something has."""
        letters = self._inbox.collect(wait_s)
        for letter in letters:
            receive = self._inbox.receive_of[letter.tag]
            task = self._dependencies.task_of[receive]
            if letter.activation is not None:
                self._inputs[task] = receive, letter.activation, letter.stamp_ns
            self._early.append((letter.stamp_ns, task))
        return bool(letters)

    def _admit(self, now_ns: int) -> None:
        """Make those tasks ready whose input has arrived, also on the emulated clock."""
        for stamp_ns, task in self._early:
            if stamp_ns <= now_ns:
                self._tasks.arrive(task)
        self._early = [(stamp_ns, task) for stamp_ns, task in self._early if stamp_ns > now_ns]

    def _note_wait(self, task: Instruction, free_ns: int) -> None:
        if task in self._inputs:
            receive, _, stamp_ns = self._inputs[task]
            end_ns = max(free_ns, stamp_ns, time.monotonic_ns() if self._emulation is None else 0)
            self.waits.append(self._clock.wait(receive, free_ns, end_ns))

    def _give_up(self, head: Instruction) -> None:
        receive = self._dependencies.receive_of[head]
        raise TransferError(
            describe_instruction(receive), (receive.peer,), f"nothing came within {self._timeout_s:g} s"
        )

    def _run_task(self, task: Instruction, from_ns: int) -> None:
        received, arrival_ns = None, 0
        if task in self._inputs:
            _, activation, arrival_ns = self._inputs.pop(task)
            received = activation.to(self._compute.device, self._compute.dtype)
        emulation = self._emulation
        start_ns = time.monotonic_ns() if emulation is None else emulation.begin(max(arrival_ns, from_ns))
        output = self._compute.run(task.opcode, task.microbatch, received)
        self._compute.finish()
        end_ns = time.monotonic_ns() if emulation is None else emulation.finish(task)
        self.spans.append(self._clock.span(task, start_ns, end_ns))
        self._tasks.finish(task)
        send = self._dependencies.send_of.get(task)
        if send is not None:
            if output is None:  # the proof excludes it
                raise ValueError(f"{send}: there is no output to send")
            self._mailbox.send(send, output, 0 if emulation is None else emulation.deliver_ns(send))
