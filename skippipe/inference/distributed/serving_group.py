"""The processes that serve a model together: who is left of them, who does what, and how all of them end."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from pydantic import JsonValue
from torch import Tensor

from skippipe.errors import NodeLostError, PeerLostError, SkipPipeError
from skippipe.inference.distributed.frame_links import FrameLinks
from skippipe.inference.distributed.stage_assignment import StageAssignment
from skippipe.membership.epoch import Member
from skippipe.membership.membership import Membership
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.remote_errors import error_content, error_elsewhere

logger = logging.getLogger(__name__)


class ServingGroup:
    """One process's view of the others. They go from epoch to epoch together (`skippipe.membership`).

    An epoch begins when all have loaded their weights, when one is lost, and, the last one, when all is done. Nobody
    comes back.
    """

    def __init__(self, membership: Membership, links: FrameLinks, assignment: StageAssignment, own: int) -> None:
        """Take part as rank `own`; `membership` has begun."""
        self.rank = own
        self.links = links
        self.holders = assignment.holders()
        """The rank that serves each stage; a stage that nobody holds is not there."""
        self.changes = 0
        """How often the holders have changed: what they keep of a text is of use only until then."""
        self.epoch = 0
        """Number of the present epoch."""
        self.end_code: int | None = None
        """The exit code with which all end; None while they go on."""
        self.driver = assignment.drivers[0]
        """The rank that embeds, samples and prints."""
        self._membership, self._assignment = membership, assignment
        self._members = {member.name: member for member in membership.members}
        self.lost: set[int] = set()
        """Ranks that are gone."""
        self._last_loss = ""
        membership.on_end = lambda _: links.wake()

    @property
    def epoch_ends(self) -> bool:
        """Whether something has happened, so that all must agree on how to go on (`next_epoch`)."""
        return self._membership.ending is not None

    @property
    def drives(self) -> bool:
        """Whether this process drives the others."""
        return self.rank == self.driver

    def member(self, rank: int) -> Member:
        """Return where a process is reached."""
        return self._members[self._assignment.names[rank]]

    def next_epoch(
        self, report: Mapping[str, JsonValue] | None = None, limit_s: float = time_limits.COMPILATION_S
    ) -> None:
        """Go on with those that are left; waits until each of them is there. `report` is that this process has ended.

        Raises:
            SkipPipeError: one of them has failed.
            PeerLostError: nobody is left that can drive the others, or they have gone on without this process.
            CommunicationError: some are alive, and do not come within `limit_s`.
        """
        epoch = self._membership.next_epoch(dict(report or {}), _decide, limit_s)
        self.epoch = epoch.number
        reasons = {event.name: event.words for event in list(self._membership.events) if event.what == "lost"}
        for rank, name in enumerate(self._assignment.names):
            if name not in epoch.names and rank not in self.lost:
                self._lose(rank, reasons.get(name, "not reached by others"))
        match epoch.decision:
            case {"failed": dict() as content, "by": str() as name}:
                self.end_code = int(content["exit_code"])
                raise error_elsewhere(content, name)
            case {"end": int() as code}:
                self.end_code = code
            case _ if not self.holders:
                raise PeerLostError(f"{self._last_loss}; start all again")

    def tell_step(self, number: int, value: Any, draws: Tensor | None) -> None:
        """Tell those that could take this process's place what a step of the task gave (`TaskProgress`).

        Raises:
            PeerLostError: they have gone on without this process, which was silent.
        """
        if self.epoch_ends:
            self.next_epoch()
        header = {"driver": self.rank, "step": number, "value": value}
        for rank in self._assignment.drivers:
            if rank not in self.lost and rank != self.rank:
                self.links.send(self.member(rank), header, {} if draws is None else {"draws": draws})

    def fail(self, error: SkipPipeError) -> None:
        """Tell all others that this process has failed, upon which they end too."""
        with suppress(SkipPipeError):
            self.next_epoch({"failed": error_content(error)})

    def end(self, code: int) -> None:
        """Let all end with an exit code, if they do not end already."""
        if self.end_code is None:
            with suppress(SkipPipeError):
                self.next_epoch({"end": code}, time_limits.ENDED_GRACE_S)

    def loss(self) -> NodeLostError:
        """Return the error that tells of the last loss."""
        names = [self._assignment.names[rank] for rank in sorted(self.lost)]
        gone = " ".join(f"--absent {name}" for name in names) if self._assignment.named else "fewer ranks"
        return NodeLostError(f"{self._last_loss}; start again with {gone}")

    def _lose(self, rank: int, why: str) -> None:
        self.lost.add(rank)
        name, names = self._assignment.names[rank], self._assignment.names
        self.links.drop(name)
        before, self.holders = self.holders, self._assignment.holders(self.lost)
        self.changes += self.holders != before
        driver, driven = self._assignment.driver(self.lost), self.driver
        self._last_loss = f"{name} was lost ({why})"
        gone = sorted(before.keys() - self.holders.keys())
        if driver is None:
            self._last_loss += " and stage 0 with it, without which nothing can be answered"
        elif gone:
            self._last_loss += f" and stage{'s' * (len(gone) > 1)} {', '.join(map(str, gone))} with it"
        elif driver != driven:
            self._last_loss += f"; {names[driver]} takes its place and prints the whole answer"
        elif self.holders != before:
            self._last_loss += "; a replica takes its place"
        self.driver = driven if driver is None else driver
        if self.drives:
            logger.warning("%s", self._last_loss)


def _decide(_: Sequence[Member], reports: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return how all end, where one of them has: a failure before all else."""
    for kind in ("failed", "end"):
        for name, report in reports.items():
            if isinstance(report, dict) and kind in report:
                return {kind: report[kind], "by": name}
    return {}
