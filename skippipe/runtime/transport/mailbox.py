"""Messages in whatever order they come, over gloo: each says which one it is.

One thread for each peer and direction waits for the next message and hands it over when all of it is there; a few
receives are posted ahead, so that no message waits for a round trip. A thread waits in gloo, without Python's lock.
(gloo cannot be asked whether a message has come, and a receive from any source does not notice that a peer is gone.)
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import NamedTuple

from torch import Tensor

from skippipe.runtime.program.program import Instruction
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.groups import ProcessGroups
from skippipe.runtime.ranks.torch_errors import TransferError, translating_errors
from skippipe.runtime.ranks.whole_messages import WholeMessage, receive_whole, send_whole
from skippipe.runtime.transport.message import MessageFormat
from skippipe.runtime.transport.transport import Outbox, describe_instruction
from skippipe_scheduler.plan.simulate import Direction

NUM_NUMBERS = 2
"""Before each activation: the tag that says which message it is, and its stamp."""
FIRST_TAG = 2**30
"""Above all tags of the static executor."""
PATIENT = timedelta(seconds=time_limits.LISTENER_S)


class Letter(NamedTuple):
    """A message that has arrived, or why none will come from this peer any more."""

    peer: int
    direction: Direction
    tag: int = -1
    activation: Tensor | None = None
    stamp_ns: int = 0
    failure: str = ""


class Mailbox:
    """Sends and receives activations of one shape and dtype; `messages` has `NUM_NUMBERS` numbers."""

    def __init__(
        self, groups: ProcessGroups, messages: MessageFormat, *, receives_ahead: int, max_unfinished: int
    ) -> None:
        self._groups = {"forward": groups.forward, "backward": groups.backward}
        self._messages = messages
        self._receives_ahead = receives_ahead
        self._outbox = Outbox(max_unfinished)
        self._parity = 1

    def listen(self, expected: Mapping[tuple[int, Direction], int], deliver: Callable[[Letter], None]) -> None:
        """Begin an iteration in which `expected` messages come by peer and direction; `deliver` is called in threads.

        Tags change from one iteration to the next: a peer that is ahead may send already.
        """
        self._parity = 1 - self._parity
        for (peer, direction), count in expected.items():
            arguments = (peer, direction, count, FIRST_TAG + self._parity, deliver)
            threading.Thread(target=self._receive, args=arguments, daemon=True, name=f"from-{peer}").start()

    def send(self, instruction: Instruction, activation: Tensor, stamp_ns: int = 0) -> None:
        """Start to send (B, T, D); the message is kept until it has left."""
        message = self._messages.pack(activation, instruction.tag, stamp_ns)
        group, tag = self._groups[instruction.direction], FIRST_TAG + self._parity
        work = translating_errors(
            describe_instruction(instruction),
            (instruction.peer,),
            lambda: send_whole(message, group, instruction.peer, tag),
        )
        self._outbox.add(instruction, message, work)

    def finish_sends(self) -> None:
        """Wait until every message has left."""
        self._outbox.finish()

    def _receive(
        self, peer: int, direction: Direction, count: int, tag: int, deliver: Callable[[Letter], None]
    ) -> None:
        group = self._groups[direction]
        posted: deque[tuple[Tensor, WholeMessage]] = deque()
        try:
            for index in range(count):
                while len(posted) < min(self._receives_ahead, count - index):
                    buffer = self._messages.empty()
                    receive = partial(receive_whole, buffer, group, peer, tag)
                    posted.append((buffer, translating_errors("", (peer,), receive)))
                buffer, work = posted.popleft()
                translating_errors("", (peer,), partial(work.wait, PATIENT))
                activation, (message_tag, stamp_ns) = self._messages.unpack(buffer)
                deliver(Letter(peer, direction, message_tag, activation, stamp_ns))
        except TransferError as error:
            deliver(Letter(peer, direction, failure=error.cause))
