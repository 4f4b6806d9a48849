"""Point-to-point messages of one activation each, over gloo.

gloo matches by (group, source, tag); a send completes when its receive is posted, and data moves in gloo's own
thread once both sides are posted. So receives are posted early and nothing blocks until the data is needed. A message
longer than the buffer would abort the process: sizes are proved equal before the run. Tensors on a GPU travel through
host memory. With emulation every message begins with the time at which it may be used.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from skippipe.runtime.failure import TransferError
from skippipe.runtime.groups import ProcessGroups
from skippipe.runtime.program import Instruction
from skippipe.runtime.wire import Wire

STAMP_BYTES = 8


def guarded(action: str, peers: tuple[int, ...], call: Callable[[], Any]) -> Any:
    """Call gloo; raise `TransferError` outside the except block, whose traceback would keep sockets open."""
    cause = ""
    try:
        return call()
    except RuntimeError as error:
        cause = str(error).splitlines()[0]
    raise TransferError(action, peers, cause)


@dataclass(frozen=True)
class Incoming:
    """A posted receive."""

    instruction: Instruction
    buffer: Tensor  # uint8, STAMP_BYTES longer where messages are stamped
    work: dist.Work


class Transport:
    """Sends and receives activations in one form."""

    def __init__(self, groups: ProcessGroups, wire: Wire, *, stamped: bool, max_unfinished: int) -> None:
        self._groups = {"forward": groups.forward, "backward": groups.backward}
        self._wire = wire
        self._prefix_bytes = STAMP_BYTES if stamped else 0
        self._max_unfinished = max_unfinished
        self._unfinished: deque[tuple[Instruction, Tensor, dist.Work]] = deque()
        self._parity = 1

    def begin_iteration(self) -> None:
        """Take other tags than the iteration before, which a slower rank may still be in."""
        self._parity = 1 - self._parity

    def post_receive(self, instruction: Instruction) -> Incoming:
        """Post the receive of a RECV instruction into a new buffer."""
        buffer = torch.empty(self._prefix_bytes + instruction.size_bytes, dtype=torch.uint8)
        work = self._post(dist.irecv, buffer, instruction)
        return Incoming(instruction, buffer, work)

    def wait(self, incoming: Incoming) -> tuple[Tensor, int]:
        """Return the activation (B, T, D) on the CPU and its stamp in nanoseconds, 0 without stamps."""
        guarded(_action(incoming.instruction), (incoming.instruction.peer,), incoming.work.wait)
        payload = self._wire.decode(incoming.buffer[self._prefix_bytes :])
        stamp_ns = int(incoming.buffer[:STAMP_BYTES].view(torch.int64)) if self._prefix_bytes else 0
        return payload, stamp_ns

    def send(self, instruction: Instruction, activation: Tensor, stamp_ns: int = 0) -> None:
        """Start to send (B, T, D); the message is kept until it has left."""
        message = self._wire.encode(activation)
        if self._prefix_bytes:
            message = torch.cat([torch.tensor([stamp_ns]).view(torch.uint8), message])
        self._unfinished.append((instruction, message, self._post(dist.isend, message, instruction)))
        while len(self._unfinished) > self._max_unfinished:
            self._finish_oldest()

    def finish_sends(self) -> None:
        """Wait until every message has left."""
        while self._unfinished:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        instruction, _, work = self._unfinished.popleft()
        guarded(_action(instruction), (instruction.peer,), work.wait)

    def _post(self, function: Callable[..., dist.Work | None], message: Tensor, instruction: Instruction) -> dist.Work:
        group = self._groups[instruction.direction]
        tag = 2 * instruction.tag + self._parity
        work: dist.Work = guarded(
            _action(instruction), (instruction.peer,), lambda: function(message, instruction.peer, group=group, tag=tag)
        )
        return work


def _action(instruction: Instruction) -> str:
    return f"waited for the {instruction}"
