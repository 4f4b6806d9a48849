"""What a rank does when a wait for others fails: end with the cause, or go on with those that are left."""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from skippipe.errors import EpochEndedError, PeerLostError
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.failure_board import FailureBoard
from skippipe.runtime.ranks.failure_guard import FailureGuard
from skippipe.runtime.ranks.torch_errors import TransferError

if TYPE_CHECKING:
    from skippipe.membership.membership import Membership

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class WaitGuard(Protocol):
    """Runs what may wait for other ranks."""

    def run(self, call: Callable[[], Result]) -> Result:
        """Call; raise a `PeerLostError` where another rank was waited for in vain, else what `call` raises."""


class EpochGuard:
    """Ends the epoch of all members where a wait fails here, so that they agree on who is left."""

    def __init__(
        self,
        membership: "Membership",
        rank: int,
        nodes: Sequence[str],
        *,
        abort: Callable[[], None],
        place: Callable[[], str],
    ) -> None:
        self._membership = membership
        self._rank = rank
        self._nodes = nodes
        self._abort = abort
        self._place = place
        membership.on_end = lambda _: abort()
        if membership.ending is not None:
            abort()

    def run(self, call: Callable[[], Result]) -> Result:
        """Call; raise `EpochEndedError` where the wait for another rank fails or the epoch has ended."""
        lost: TransferError | None = None
        try:
            return call()
        except TransferError as error:
            lost = error.with_traceback(None)
        # Outside of the except block, see `torch_errors.raising_outside`.
        self._abort()
        words = f"rank {self._rank} ({self._nodes[self._rank]}) {lost.action} in vain ({lost.cause}) [{self._place()}]"
        for peer in lost.peers:
            self._membership.suspect(self._nodes[peer], words)
        raise EpochEndedError(self._membership.ending or words)


def make_guard(
    context: DistributedContext,
    nodes: Sequence[str],
    *,
    abort: Callable[[], None],
    place: Callable[[], str],
) -> WaitGuard:
    """Return the guard of this rank: with a membership a loss ends the epoch, without one it ends the run."""
    if context.membership is not None:
        return EpochGuard(context.membership, context.rank, nodes, abort=abort, place=place)
    if context.store is None:
        raise PeerLostError("a distributed run needs a context that has met the other ranks")
    board = FailureBoard(context.store, context.rank, nodes)
    return FailureGuard(board, context.rank, nodes, abort=abort, place=place)
