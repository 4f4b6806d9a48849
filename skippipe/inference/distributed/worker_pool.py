"""The processes that serve a model, as the one that drives them sees them."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from skippipe.errors import NodeLostError, SkipPipeError
from skippipe.inference.depth_schedule import LayerSelection
from skippipe.inference.distributed.connections import Connections, Frame
from skippipe.inference.distributed.stage_assignment import StageAssignment
from skippipe.runtime.ranks.remote_errors import error_elsewhere

logger = logging.getLogger(__name__)

Hop = tuple[int, LayerSelection]
"""A rank and the layers that it runs."""


class WorkerPool:
    """Sends hidden states through other processes, and knows which of these are lost.

    A process is lost where its connection ends, where another one cannot reach it, or where it is the next to answer
    and is silent for `limit_s`. Nobody comes back.
    """

    def __init__(self, links: Connections, assignment: StageAssignment, limit_s: float) -> None:
        self._links, self._assignment, self._limit_s = links, assignment, limit_s
        self._others = set(range(len(assignment.names))) - {assignment.driver}
        self._heard: set[int] = set()
        self._ready: set[int] = set()
        self._lost: set[int] = set()
        self._last_loss = ""
        self._failure: SkipPipeError | None = None
        self._pass = 0
        self.holders = assignment.holders()
        """The rank that serves each stage."""
        self.changes = 0
        """How often the holders have changed: what they keep of a text is of use only until then."""

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return self._assignment.driver

    def assemble(self) -> None:
        """Wait until all others are here; one that does not come in time is lost."""
        deadline_s = time.monotonic() + self._limit_s
        while missing := self._others - self._heard - self._lost:
            if not self._note(max(deadline_s - time.monotonic(), 0.0)):
                for rank in missing:
                    self._lose(rank, f"did not come within {self._limit_s:g} s")
        self._check()

    def wait_until_ready(self) -> None:
        """Wait until all others have their weights; raise what one of them met with that."""
        while self._others - self._ready - self._lost:
            self._note(None)
            self._check()

    def end(self, code: int) -> None:
        """Send the others home with an exit code."""
        for rank in self._others - self._lost:
            try:
                self._links.send(rank, {"end": code})
            except OSError:
                continue

    def run(self, hops: Sequence[Hop], order: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
        """Send `hidden` (B, t, D), one of `tensors`, along `hops`; return what comes back.

        Raises `NodeLostError` where one of them is lost on the way, or any that serves a stage.
        """
        self._pass += 1
        changes = self.changes
        try:
            self._links.send(hops[0][0], {**order, "pass": self._pass, "hop": 0, "hops": hops}, tensors)
        except OSError:
            self._lose(hops[0][0], "cannot be reached")
        due = 0
        while self.changes == changes:
            received = self._links.receive(self._limit_s)
            if received is None:
                self._lose(hops[due][0], f"silent for {self._limit_s:g} s")
                continue
            rank, frame = received
            if frame is None:
                self._lose(rank, "its connection ended")
            elif frame.header.get("pass") == self._pass:
                if "hidden" in frame.tensors:
                    return frame.tensors["hidden"]
                due = max(due, int(frame.header["done"]) + 1)
                if "unreachable" in frame.header:
                    self._lose(
                        int(frame.header["unreachable"]), f"cannot be reached from {self._assignment.names[rank]}"
                    )
        raise self.loss()

    def loss(self) -> NodeLostError:
        """Return the error that tells of the last loss."""
        names = [self._assignment.names[rank] for rank in sorted(self._lost)]
        gone = " ".join(f"--absent {name}" for name in names) if self._assignment.named else "fewer ranks"
        return NodeLostError(f"{self._last_loss}; start again with {gone}")

    def _note(self, limit_s: float | None) -> bool:
        """Take in one message of the start; return whether one came in time."""
        received = self._links.receive(limit_s)
        if received is None:
            return False
        rank, frame = received
        if frame is None:
            self._lose(rank, "its connection ended")
        else:
            self._heard.add(rank)
            self._take_in(rank, frame)
        return True

    def _take_in(self, rank: int, frame: Frame) -> None:
        if "failed" in frame.header:
            self._failure = error_elsewhere(frame.header["failed"], self._assignment.names[rank])
        if "ready" in frame.header:
            self._ready.add(rank)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _lose(self, rank: int, why: str) -> None:
        if rank in self._lost or rank == self.rank:
            return
        self._lost.add(rank)
        self._links.drop(rank)
        before, self.holders = self.holders, self._assignment.holders(self._lost)
        self._last_loss = f"{self._assignment.names[rank]} was lost ({why})"
        if self.holders != before:
            self.changes += 1
            gone = sorted(before.keys() - self.holders.keys())
            stages = f"stage{'s' * (len(gone) > 1)} {', '.join(map(str, gone))}"
            self._last_loss += f" and {stages} with it" if gone else "; a replica takes its place"
        logger.warning("%s", self._last_loss)
