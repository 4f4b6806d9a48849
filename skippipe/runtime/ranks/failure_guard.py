"""What a rank does when something fails: it tells the others why, and ends their waiting for it."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from skippipe.errors import PeerLostError, StoppedError
from skippipe.runtime.ranks.failure_board import FailureBoard
from skippipe.runtime.ranks.torch_errors import TransferError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class FailureGuard:
    """Runs what may wait for other ranks.

    `abort` makes every wait on the connections of this rank fail, here and at its peers; `place` says where it stands.
    """

    def __init__(
        self,
        board: FailureBoard,
        rank: int,
        nodes: Sequence[str],
        *,
        abort: Callable[[], None],
        place: Callable[[], str],
    ) -> None:
        self._board = board
        self._rank = rank
        self._nodes = nodes
        self._abort = abort
        self._place = place

    def run(self, call: Callable[[], Result]) -> Result:
        """Call; where it fails, tell the other ranks why and wake those that wait for this one.

        Raises `PeerLostError` with the cause where another rank was waited for in vain, else what `call` raises.
        """
        lost: TransferError | None = None
        try:
            return call()
        except (PeerLostError, StoppedError):
            raise  # a guarded call inside, or who gave the step up, has told the others already
        except TransferError as error:
            lost = error.with_traceback(None)
        except Exception as error:
            self._stop(f"{type(error).__name__}: {error}")
            self._leave()
            raise
        if self._board.step_is_given_up:
            self._abort()
            raise StoppedError("another rank has given the step up after a signal")
        # Outside of the except block, see `torch_errors.raising_outside`. Said before the store is asked: it may hang.
        logger.error("%s in vain (%s); asking the others why", lost.action, lost.cause)
        self._stop(str(lost), lost.peers)
        message = self._message(lost)
        self._leave()
        raise PeerLostError(message)

    def _stop(self, message: str, peers: Sequence[int] = ()) -> None:
        self._board.report(message, peers, self._place())
        self._abort()

    def _leave(self) -> None:
        """Let rank 0 say who waits for whom, and stay until the others have read the reports."""
        if self._rank == 0:
            for line in self._board.table().splitlines():
                logger.error("%s", line)
        self._board.leave()

    def _message(self, lost: TransferError) -> str:
        names = ", ".join(self._nodes[rank] for rank in lost.peers[:3])
        more = ", ..." if len(lost.peers) > 3 else ""
        cause = self._board.root_cause(lost.peers) or lost.cause
        return (
            f"rank {self._rank} ({self._nodes[self._rank]}) {lost.action} ({names}{more}) in vain; {cause} "
            f"[{self._place()}]; the run can be continued from its last checkpoint"
        )
