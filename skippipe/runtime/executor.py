"""The static executor: walks a program's list. Receives are posted ahead, and waited for just before their use."""

import time
from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch import Tensor

from skippipe.runtime.compute import StageCompute
from skippipe.runtime.emulation import Emulation
from skippipe.runtime.program import Direction, Instruction, Opcode, Program
from skippipe.runtime.runner import Batch, Span, Wait
from skippipe.runtime.transport import Incoming, Transport


class Executor:
    """Runs one program once. `current` is the instruction it stands at, for messages about failures."""

    def __init__(
        self,
        program: Program,
        compute: StageCompute,
        transport: Transport,
        emulation: Emulation | None,
        *,
        nodes: Sequence[str],
        receive_window: int,
        zero_ns: int,
    ) -> None:
        self.current: Instruction | None = None
        self.spans: list[Span] = []
        self.waits: list[Wait] = []
        self._program = program
        self._compute = compute
        self._transport = transport
        self._emulation = emulation
        self._nodes = nodes
        self._receive_window = receive_window
        self._zero_ns = zero_ns
        self._outputs: dict[int, Tensor | None] = {}
        self._incoming: dict[tuple[int, Direction], Incoming] = {}

    def run(self, batch: Batch, reduce: Callable[[], None], step: Callable[[], None]) -> None:
        """Execute all instructions; `reduce` and `step` are called at REDUCE and STEP."""
        self._transport.begin_iteration()
        receives = iter(self._program.select(Opcode.RECV))
        for instruction in islice(receives, self._receive_window):
            self._post(instruction)
        for instruction in self._program.instructions:
            self.current = instruction
            match instruction.opcode:
                case Opcode.LOAD:
                    self._compute.load(instruction.microbatch, *batch(instruction.microbatch))
                case Opcode.FORWARD | Opcode.LOSS | Opcode.BACKWARD | Opcode.WEIGHT:
                    self._run_task(instruction)
                case Opcode.SEND:
                    self._send(instruction)
                case Opcode.RECV:  # posted long ago; keep the window full
                    for following in islice(receives, 1):
                        self._post(following)
                case Opcode.REDUCE:
                    reduce()
                case Opcode.STEP:
                    step()
        self._transport.finish_sends()

    def _post(self, instruction: Instruction) -> None:
        key = instruction.microbatch, instruction.direction
        self._incoming[key] = self._transport.post_receive(instruction)

    def _run_task(self, instruction: Instruction) -> None:
        microbatch = instruction.microbatch
        operation = instruction.opcode.value[0]
        received, arrival_ns = self._receive(instruction)
        start_ns = time.monotonic_ns() if self._emulation is None else self._emulation.begin(arrival_ns)
        output = self._compute.run(instruction.opcode, microbatch, received)
        if instruction.opcode is not Opcode.WEIGHT:  # its BACKWARD's output may not have left yet
            self._outputs[microbatch] = output
        self._compute.finish()
        end_ns = time.monotonic_ns() if self._emulation is None else self._emulation.finish(operation, microbatch)
        node = self._program.node
        self.spans.append(Span(node, operation, microbatch, self._since_zero(start_ns), self._since_zero(end_ns)))

    def _receive(self, instruction: Instruction) -> tuple[Tensor | None, int]:
        """Return the task's input on the device and its emulated arrival; nothing where nothing is sent for it."""
        direction: Direction = "backward" if instruction.opcode is Opcode.BACKWARD else "forward"
        if instruction.opcode is Opcode.WEIGHT or (instruction.opcode is Opcode.FORWARD and instruction.hop == 0):
            return None, 0
        incoming = self._incoming.pop((instruction.microbatch, direction))
        start_s = self._since_zero(time.monotonic_ns())
        tensor, arrival_ns = self._transport.wait(incoming)
        transfer = incoming.instruction
        self.waits.append(
            Wait(
                self._nodes[transfer.peer],
                self._program.node,
                transfer.microbatch,
                transfer.hop,
                transfer.direction,
                start_s,
                self._since_zero(max(time.monotonic_ns(), arrival_ns)),
            )
        )
        return tensor.to(self._compute.device, self._compute.dtype), arrival_ns

    def _send(self, instruction: Instruction) -> None:
        output = self._outputs.pop(instruction.microbatch)
        if output is None:  # the proof excludes it
            raise ValueError(f"{instruction}: there is no output to send")
        if self._emulation is None:
            self._transport.send(instruction, output)
        else:
            deliver_ns = self._emulation.deliver_ns(self._nodes[instruction.peer])
            self._transport.send(instruction, output, deliver_ns)

    def _since_zero(self, time_ns: int) -> float:
        return (time_ns - self._zero_ns) * 1e-9


@torch.no_grad()
def run_without_gradients(executor: Executor, batch: Batch) -> None:
    """Run a program that has no backward."""
    executor.run(batch, _nothing, _nothing)


def _nothing() -> None:
    """Stand for REDUCE and STEP in a program without them."""
