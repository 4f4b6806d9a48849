"""Point-to-point messages of one activation each.

A send completes when its receive is posted, and data moves without Python once both sides are posted. So receives are
posted early and nothing blocks until the data is needed. A message longer than the buffer would abort the process:
sizes are proved equal before the run. With emulation every message begins with the time at which it may be used.

`TaggedTransport` is for gloo, which matches by (group, source, tag); tensors on a GPU travel through host memory.
`OrderedTransport` is for channels that match by order, NCCL before all.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from skippipe.runtime.program.program import Instruction
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.groups import Channels, ProcessGroups
from skippipe.runtime.ranks.torch_errors import TransferError, begun, translating_errors
from skippipe.runtime.ranks.whole_messages import Waitable, WholeMessage, receive_whole, send_whole, whole
from skippipe.runtime.transport.message import MessageFormat


@dataclass(frozen=True)
class Incoming:
    """A posted receive."""

    instruction: Instruction
    buffer: Tensor  # uint8
    work: Waitable


class Transport(Protocol):
    """What a static executor needs: it posts in the program's order, and waits in any."""

    def begin_iteration(self) -> None:
        """Prepare for the messages of another iteration."""

    def post_receive(self, instruction: Instruction) -> Incoming:
        """Post the receive of a RECV instruction into a new buffer."""

    def wait(self, incoming: Incoming) -> tuple[Tensor, int]:
        """Return the activation (B, T, D) and its stamp in nanoseconds, 0 without stamps.

        What computes on the activation afterwards waits for it where this call does not.
        """

    def confirm(self, incoming: Incoming) -> None:
        """Return when the activation is really there; raise `TransferError` where it does not come in time."""

    def send(self, instruction: Instruction, activation: Tensor, stamp_ns: int = 0) -> None:
        """Start to send (B, T, D); the message is kept until it has left."""

    def finish_sends(self) -> None:
        """Wait until every message has left."""


class Outbox:
    """Messages on their way: each is kept until it has left, and no more than `max_unfinished` are kept."""

    def __init__(self, max_unfinished: int) -> None:
        self._max_unfinished = max_unfinished
        self._unfinished: deque[tuple[Instruction, Tensor, Waitable]] = deque()

    def add(self, instruction: Instruction, message: Tensor, work: Waitable) -> None:
        """Keep a message until its `work` is done."""
        self._unfinished.append((instruction, message, work))
        while len(self._unfinished) > self._max_unfinished:
            self._finish_oldest()

    def finish(self) -> None:
        """Wait until every message has left."""
        while self._unfinished:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        instruction, _, work = self._unfinished.popleft()
        translating_errors(describe_instruction(instruction), (instruction.peer,), work.wait)


class TaggedTransport:
    """Messages find their receive by tag, in one group for each direction."""

    def __init__(self, groups: ProcessGroups, messages: MessageFormat, max_unfinished: int) -> None:
        self._groups = {"forward": groups.forward, "backward": groups.backward}
        self._messages = messages
        self._outbox = Outbox(max_unfinished)
        self._parity = 1

    def begin_iteration(self) -> None:
        """Take other tags than the iteration before, which a slower rank may still be in."""
        self._parity = 1 - self._parity

    def post_receive(self, instruction: Instruction) -> Incoming:
        """Post a receive; see `Transport`."""
        buffer = self._messages.empty()
        return Incoming(instruction, buffer, self._post(receive_whole, buffer, instruction))

    def wait(self, incoming: Incoming) -> tuple[Tensor, int]:
        """Wait for the activation; see `Transport`."""
        translating_errors(describe_instruction(incoming.instruction), (incoming.instruction.peer,), incoming.work.wait)
        activation, numbers = self._messages.unpack(incoming.buffer)
        return activation, numbers[0] if numbers else 0

    def confirm(self, incoming: Incoming) -> None:
        """Return: `wait` has waited."""

    def send(self, instruction: Instruction, activation: Tensor, stamp_ns: int = 0) -> None:
        """Start to send; see `Transport`."""
        message = self._messages.pack(activation, stamp_ns)
        self._outbox.add(instruction, message, self._post(send_whole, message, instruction))

    def finish_sends(self) -> None:
        """Wait until every message has left."""
        self._outbox.finish()

    def _post(self, function: Callable[..., WholeMessage], message: Tensor, instruction: Instruction) -> Waitable:
        group = self._groups[instruction.direction]  # of all ranks: each has its own number in it
        tag = 2 * instruction.tag + self._parity
        return translating_errors(
            describe_instruction(instruction),
            (instruction.peer,),
            lambda: function(message, group, instruction.peer, tag),
        )


class OrderedTransport:
    """Messages find their receive by order alone, in one group for each directed pair of ranks and direction.

    Both sides of a channel post in the order of their lists, which the proof has found to be the same. An operation
    that waits for its peer holds up its own channel only, and a channel carries one way only, so a pending send never
    stands before a receive. On a GPU an activation does not pass through host memory, and `wait` makes the device's
    stream wait while the host goes on to launch what comes next.
    """

    def __init__(self, rank: int, channels: Channels, messages: MessageFormat, max_unfinished: int) -> None:
        self._rank = rank
        self._channels = channels
        self._messages = messages
        self._outbox = Outbox(max_unfinished)

    def begin_iteration(self) -> None:
        """Return: order goes on from one iteration to the next."""

    def post_receive(self, instruction: Instruction) -> Incoming:
        """Post a receive; see `Transport`."""
        group = self._channels.group(instruction.peer, self._rank, instruction.direction)
        buffer = self._messages.empty()
        return Incoming(instruction, buffer, self._post(dist.irecv, buffer, instruction, group))

    def wait(self, incoming: Incoming) -> tuple[Tensor, int]:
        """Wait, or make the stream wait, for the activation; see `Transport`."""
        translating_errors(describe_instruction(incoming.instruction), (incoming.instruction.peer,), incoming.work.wait)
        activation, numbers = self._messages.unpack(incoming.buffer)
        return activation, numbers[0] if numbers else 0

    def confirm(self, incoming: Incoming) -> None:
        """Ask until NCCL says that the activation is there; gloo's `wait` has waited for it."""
        if not isinstance(incoming.work, dist.Work):
            return
        deadline_s = time.monotonic() + self._channels.timeout_s
        peers = (incoming.instruction.peer,)
        while not translating_errors(describe_instruction(incoming.instruction), peers, incoming.work.is_completed):
            if time.monotonic() > deadline_s:
                cause = f"nothing came within {self._channels.timeout_s:g} s"
                raise TransferError(describe_instruction(incoming.instruction), peers, cause)
            time.sleep(time_limits.DEVICE_POLL_S)

    def send(self, instruction: Instruction, activation: Tensor, stamp_ns: int = 0) -> None:
        """Start to send; see `Transport`."""
        group = self._channels.group(self._rank, instruction.peer, instruction.direction)
        message = self._messages.pack(activation, stamp_ns)
        self._outbox.add(instruction, message, self._post(dist.isend, message, instruction, group))

    def finish_sends(self) -> None:
        """Wait until every message has left."""
        self._outbox.finish()

    def _post(
        self,
        function: Callable[..., dist.Work | None],
        message: Tensor,
        instruction: Instruction,
        group: dist.ProcessGroup,
    ) -> Waitable:
        def post(part: Tensor) -> dist.Work | None:
            return function(part, instruction.peer, group=group)

        def post_all() -> Waitable:
            return whole(post, message) if self._messages.device.type == "cpu" else begun(post(message))

        return translating_errors(describe_instruction(instruction), (instruction.peer,), post_all)


def describe_instruction(instruction: Instruction) -> str:
    """Say what a transfer that fails was."""
    return f"waited for the {instruction}"
