"""Who failed first: ranks that stop say in the store why, so that each can name the cause and not its neighbour.

When one rank stops, all connections close in a wave, and most ranks see only their neighbour go. So a rank that
stops publishes whom it waited for; following these from rank to rank ends at one that failed on its own, or at one
that gives no answer.
"""

import json
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

from torch._C._distributed_c10d import Store

from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.store_names import GIVEN_UP, Board, store_of_board


class FailureReport(NamedTuple):
    """What a rank that stops says: why, the ranks it waited for, and where it stood."""

    message: str
    peers: list[int]
    place: str


class FailureBoard:
    """Reports of the ranks that stopped, in the store that all ranks share."""

    def __init__(self, store: Store, rank: int, nodes: Sequence[str]) -> None:
        self._store = store_of_board(store, Board.FAILURE)
        self._rank = rank
        self._nodes = nodes
        self._silent: list[int] = []
        self._read_until_s: float | None = None

    @property
    def step_is_given_up(self) -> bool:
        """Whether connections close because a rank has given the step up on purpose."""
        try:
            return bool(self._store.check([GIVEN_UP]))
        except RuntimeError:
            return False

    def report(self, message: str, peers: Sequence[int], place: str = "") -> None:
        """Publish that this rank stops at `place` and which ranks it waited for; none where the fault is its own."""
        self._silent, self._read_until_s = [], None
        try:
            self._store.set_timeout(timedelta(seconds=time_limits.LAST_WORDS_S))
            self._store.set(str(self._rank), json.dumps({"message": message, "peers": list(peers), "place": place}))
        except RuntimeError:
            return  # the rank that holds the store is gone; the others find out by themselves

    def root_cause(self, peers: Sequence[int]) -> str:
        """Return the cause in words, found by following who waited for whom from `peers`; "" where unknown."""
        seen, stopped = {self._rank}, []
        frontier = list(peers)
        try:
            while frontier:
                rank = frontier.pop(0)
                if rank in seen:
                    continue
                seen.add(rank)
                report = self._read(rank)
                if report is None:
                    continue
                frontier += report.peers
                if not report.peers:
                    stopped.append(f"{self._name(rank)} stopped: {report.message}")
        except RuntimeError:
            return "the store is gone too: its process, the first one started, or that machine may be lost"
        if stopped:
            return "; ".join(stopped)
        return f"no sign of life from {', '.join(map(self._name, self._silent))}" if self._silent else ""

    def leave(self) -> None:
        """Wait until the other ranks have read what they need: the store may end with this process."""
        deadline_s = time.monotonic() + time_limits.LAST_WORDS_S
        try:
            others = [rank for rank in range(len(self._nodes)) if self._may_read(rank)]
            self._store.set(f"left-{self._rank}", "")
            while not self._store.check([f"left-{rank}" for rank in others]) and time.monotonic() < deadline_s:
                time.sleep(time_limits.STORE_POLL_S)
        except RuntimeError:
            return

    def _may_read(self, rank: int) -> bool:
        """Whether a rank may still want to read: one that said nothing while another was waited for is silent too."""
        return not self._silent or self._store.check([str(rank)])

    def table(self) -> str:
        """Return who waits for whom, a line for each rank: its place, and the ranks it waited for."""
        lines = ["who waits for whom:"]
        try:
            for rank in range(len(self._nodes)):
                lines.append(f"  {self._name(rank):<24} {self._line(self._read(rank))}")
        except RuntimeError:
            lines.append("  (the store is gone)")
        return "\n".join(lines)

    def _line(self, report: "FailureReport | None") -> str:
        if report is None:
            return "no answer"
        place = f"{report.place}; " if report.place else ""
        if not report.peers:
            return f"{place}stopped: {report.message}"
        peers = [f"rank {peer}" for peer in report.peers]
        everyone = len(peers) > 1 and len(peers) == len(self._nodes) - 1
        return f"{place}waits for {'all others' if everyone else ', '.join(peers)}"

    def _read(self, rank: int) -> "FailureReport | None":
        """Return what a rank says; None where it is silent. All readings after one `report` share a time limit."""
        if self._read_until_s is None:
            self._read_until_s = time.monotonic() + time_limits.LAST_WORDS_S
        key = str(rank)
        while not self._store.check([key]):
            if time.monotonic() > self._read_until_s:
                self._silent.append(rank)
                return None
            time.sleep(time_limits.STORE_POLL_S)
        report = json.loads(self._store.get(key))
        return FailureReport(str(report["message"]), [int(peer) for peer in report["peers"]], str(report["place"]))

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({self._nodes[rank]})"


def give_step_up(store: Store) -> None:
    """Say in the store of a try that the present step is given up on purpose."""
    store_of_board(store, Board.FAILURE).set(GIVEN_UP, "")


def step_is_given_up(store: Store) -> bool:
    """Say whether a rank has said so."""
    return bool(store_of_board(store, Board.FAILURE).check([GIVEN_UP]))
