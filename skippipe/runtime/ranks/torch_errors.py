"""Errors of torch.distributed, made into ours without holding on to what they came from."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

CallResult = TypeVar("CallResult")


class TransferError(Exception):
    """A wait, send or collective of gloo failed: `peers` are the ranks it needed, `action` says what it was."""

    def __init__(self, action: str, peers: Sequence[int], cause: str) -> None:
        super().__init__(f"{action}: {cause}")
        self.action = action
        self.peers = tuple(peers)
        self.cause = cause


def raising_outside(
    call: Callable[[], CallResult],
    error_of: Callable[[str], Exception],
    kinds: tuple[type[Exception], ...] = (RuntimeError,),
) -> CallResult:
    """Call; where it raises one of `kinds`, raise what `error_of` makes of the first line of the message.

    It is raised outside of the except block. Inside, torch's error would be its context, `from None` or not, and that
    one's traceback keeps every frame of the call: process groups could not be destroyed, their sockets would stay open,
    and another rank that waits for this one would wait for ever.
    """
    cause = ""
    try:
        return call()
    except kinds as reason:
        cause = (str(reason).splitlines() or [type(reason).__name__])[0]
    raise error_of(cause)


def begun(work: dist.Work | None) -> dist.Work:
    """Return the work of a send or receive; torch gives none to a process that is not in the group."""
    if work is None:
        raise ValueError("this process is not in the group of the transfer")
    return work


def translating_errors(action: str, peers: Sequence[int], call: Callable[[], CallResult]) -> CallResult:
    """Call torch.distributed; raise `TransferError` where it fails."""
    return raising_outside(call, lambda cause: TransferError(action, peers, cause))
