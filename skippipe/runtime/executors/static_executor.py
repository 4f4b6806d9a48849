"""Executors: what they have in common, and the static one, which walks a program's list.

Receives are posted ahead, and waited for just before their use.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from skippipe.runtime.executors.emulation import Emulation
from skippipe.runtime.program.program import INPUT_OF, OPERATION_OF_OPCODE, TASKS, Instruction, Opcode, Program
from skippipe.runtime.runner import BatchLoader, Span, TransferWait
from skippipe.runtime.stage_compute import StageCompute
from skippipe.runtime.transport.transport import Incoming, Transport
from skippipe_scheduler.plan.simulate import Direction

Result = TypeVar("Result")


class Executor(Protocol):
    """Runs one program once: first `run`, then `finish`."""

    current: Instruction | None
    """The instruction it stands at, for messages about failures."""
    spans: list[Span]
    waits: list[TransferWait]

    def run(self, batch: BatchLoader, reduce: Callable[[], None]) -> None:
        """Execute all instructions before STEP, with `reduce` at REDUCE."""

    def finish(self, step: Callable[[], Result]) -> Result:
        """Call `step` at STEP, where a program ends; return what it returns once every message has left."""


@dataclass(frozen=True)
class ProgramClock:
    """Where and since when a program runs; names spans and waits."""

    program: Program
    nodes: Sequence[str]
    zero_ns: int

    def since_zero_s(self, time_ns: int) -> float:
        """Return seconds since the iteration began."""
        return (time_ns - self.zero_ns) * 1e-9

    def span(self, task: Instruction, start_ns: int, end_ns: int) -> Span:
        """Return the span of a task."""
        operation = OPERATION_OF_OPCODE[task.opcode]
        return Span(
            self.program.node, operation, task.microbatch, self.since_zero_s(start_ns), self.since_zero_s(end_ns)
        )

    def wait(self, receive: Instruction, start_ns: int, end_ns: int) -> TransferWait:
        """Return how long this rank stood still for the message of a RECV."""
        return TransferWait(
            self.nodes[receive.peer],
            self.program.node,
            receive.microbatch,
            receive.hop,
            receive.direction,
            self.since_zero_s(start_ns),
            self.since_zero_s(end_ns),
        )


class StaticExecutor:
    """Runs a program in the order of its list."""

    def __init__(
        self,
        clock: ProgramClock,
        compute: StageCompute,
        transport: Transport,
        emulation: Emulation | None,
        *,
        receive_window: int,
    ) -> None:
        self.current: Instruction | None = None
        self.spans: list[Span] = []
        self.waits: list[TransferWait] = []
        self._clock = clock
        self._compute = compute
        self._transport = transport
        self._emulation = emulation
        self._receive_window = receive_window
        self._outputs: dict[int, Tensor] = {}
        self._incoming: dict[tuple[int, Direction], Incoming] = {}

    def run(self, batch: BatchLoader, reduce: Callable[[], None]) -> None:
        """Execute all instructions before STEP; see `Executor`."""
        self._transport.begin_iteration()
        program = self._clock.program
        receives = iter(program.select(Opcode.RECV))
        for instruction in islice(receives, self._receive_window):
            self._post(instruction)
        for instruction in program.instructions:
            self.current = instruction
            match instruction.opcode:
                case Opcode.LOAD:
                    self._compute.load(instruction.microbatch, *batch(instruction.microbatch))
                case opcode if opcode in TASKS:
                    self._run_task(instruction)
                case Opcode.SEND:
                    self._send(instruction)
                case Opcode.RECV:  # posted long ago; keep the window full
                    for following in islice(receives, 1):
                        self._post(following)
                case Opcode.REDUCE:
                    reduce()
                case Opcode.STEP:
                    return  # the last one, by the proof

    def finish(self, step: Callable[[], Result]) -> Result:
        """Step; see `Executor`."""
        result = step()
        self._transport.finish_sends()
        return result

    def _post(self, instruction: Instruction) -> None:
        key = instruction.microbatch, instruction.direction
        self._incoming[key] = self._transport.post_receive(instruction)

    def _run_task(self, task: Instruction) -> None:
        incoming, received, arrival_ns = self._receive(task)
        start_ns = time.monotonic_ns() if self._emulation is None else self._emulation.begin(arrival_ns)
        output = self._compute.run(task.opcode, task.microbatch, received)
        if output is not None:
            self._outputs[task.microbatch] = output
        if incoming is not None:
            self._transport.confirm(incoming)
        self._compute.finish()
        end_ns = time.monotonic_ns() if self._emulation is None else self._emulation.finish(task)
        self.spans.append(self._clock.span(task, start_ns, end_ns))

    def _receive(self, task: Instruction) -> tuple[Incoming | None, Tensor | None, int]:
        """Return the task's input on the device and its emulated arrival; nothing where nothing is sent for it."""
        direction = INPUT_OF.get(task.opcode)
        # The receive of a microbatch's loss may be posted before its forward at the origin.
        begins = task.opcode is Opcode.FORWARD and task.hop == 0
        incoming = None if begins or direction is None else self._incoming.pop((task.microbatch, direction), None)
        if incoming is None:
            return None, None, 0
        start_ns = time.monotonic_ns()
        tensor, arrival_ns = self._transport.wait(incoming)
        self.waits.append(self._clock.wait(incoming.instruction, start_ns, max(time.monotonic_ns(), arrival_ns)))
        return incoming, tensor.to(self._compute.device, self._compute.dtype), arrival_ns

    def _send(self, instruction: Instruction) -> None:
        output = self._outputs.pop(instruction.microbatch, None)
        if output is None:  # the proof excludes it
            raise ValueError(f"{instruction}: there is no output to send")
        deliver_ns = 0 if self._emulation is None else self._emulation.deliver_ns(instruction)
        self._transport.send(instruction, output, deliver_ns)


@torch.no_grad()
def run_without_gradients(executor: Executor, batch: BatchLoader) -> None:
    """Run a program that has no backward."""
    executor.run(batch, _nothing)
    executor.finish(_nothing)


def _nothing() -> None:
    """Stand for REDUCE and STEP in a program without them."""
