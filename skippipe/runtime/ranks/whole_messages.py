"""Messages over gloo whose waits end when their connection does, also in the middle of a message.

When a connection fails or is aborted, gloo tells the receives that are pending, and forgets the one whose bytes are
just coming in (`Pair::signalException` in gloo/transport/tcp/pair.cc): that one would wait until its group's time is
up. So an empty message goes behind each one, on the same way, and its receive is what is waited for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from skippipe.runtime.ranks.torch_errors import begun

PACKET_BYTES = 1024
"""Messages up to here fit into one packet, and come as a whole or not at all."""

_EMPTY = torch.empty(0)


class Waitable(Protocol):
    """Communication that has begun."""

    def wait(self) -> object:
        """Wait until it has ended."""


@dataclass(frozen=True)
class WholeMessage:
    """A message under way, and the empty one behind it."""

    body: dist.Work
    end: dist.Work | None

    def wait(self, timeout: timedelta | None = None) -> None:
        """Wait until it has left, or is there; at most for a time, which closes all connections of the group."""
        for work in (self.end, self.body):
            if work is not None:
                work.wait() if timeout is None else work.wait(timeout)


def whole(post: Callable[[Tensor], dist.Work | None], message: Tensor) -> WholeMessage:
    """Begin to send or receive a message on the CPU, and what goes behind it, by a function that begins one transfer.

    Both sides have to do so, with the same tag for both and with no other message of that tag between them.
    """
    body = begun(post(message))
    return WholeMessage(body, begun(post(_EMPTY)) if message.nbytes > PACKET_BYTES else None)


def send_whole(message: Tensor, group: dist.ProcessGroup, peer: int, tag: int) -> WholeMessage:
    """Begin to send to the rank `peer` of a group; without the checks of `dist.isend`, which take as long again."""
    return whole(lambda part: group.send([part], peer, tag), message)


def receive_whole(buffer: Tensor, group: dist.ProcessGroup, peer: int, tag: int) -> WholeMessage:
    """Begin to receive from the rank `peer` of a group."""
    return whole(lambda part: group.recv([part], peer, tag), buffer)
