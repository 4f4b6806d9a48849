"""One process's membership in a run: what the application calls, and the thread that speaks with the others."""

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Self

from pydantic import JsonValue

from skippipe.errors import CommunicationError, MinorityError, SkipPipeError
from skippipe.membership.epoch import Epoch, Member
from skippipe.membership.epoch_vote import EpochVote, Outgoing, Question
from skippipe.membership.keys import run_keys
from skippipe.membership.links import Links
from skippipe.membership.member_link import address_of
from skippipe.membership.member_protocol import MemberProtocol, MembershipEvent
from skippipe.membership.messages import Leave

logger = logging.getLogger(__name__)
Decide = Callable[[Sequence[Member], Mapping[str, JsonValue]], dict[str, JsonValue]]
"""What the application decides for the next epoch, from its members in order and the report of each but newcomers."""
_TURN_S = 0.1
"""While an epoch ends."""
_IDLE_TURN_S = 0.5
"""While one lasts, where news come by themselves; and less than a silence by far."""
_APPLY_S = 0.5
_CONNECT_S = 1.0
"""How long a proposer waits for the connection to an applicant of whom it has heard: some round trips of a far link."""
_FAREWELL_S = 5.0
"""How long one that leaves waits for others that live and have not come to the present epoch."""
_LOOK_S = 0.2
"""How long who begins waits for the others' hellos until it looks whether they live, and from then on does so."""
_NOBODY = "0" * 32


class Membership:
    """A process in a run, from `open` to `leave` or `close`.

    An epoch ends when a member is lost or leaves, or when one asks for it; `ending` says why, and `on_end` is called
    once, from this object's thread. All who live then call `next_epoch`. A process must not go on in an epoch that has
    ended, nor write anything that outlives it.
    """

    def __init__(self, own: Member, links: Links, silence_s: float):
        self.own = own
        self.on_end: Callable[[str], None] | None = None
        self._links = links
        self._protocol = MemberProtocol(own, links, silence_s)
        self._idle_turn_s = max(_TURN_S, min(_IDLE_TURN_S, silence_s / 4))
        self._changed = threading.Condition()
        self._calls: list[Callable[[], None]] = []
        self._closing: Literal["leave", "close"] | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="membership", daemon=True)

    @classmethod
    def open(cls, name: str, host: str, secret: str, silence_s: float = 5.0, data_port: int = 0) -> Self:
        """Bind a port, under which others reach this process at `host`; whoever holds `secret` may.

        A member is silent after `silence_s` without a sign of life, and noticed so within a second more. `data_port` is
        that of this process's `Exchange`, if it has one.

        Raises:
            ConfigError: the secret is too short.
        """
        links = Links(run_keys(secret), silence_s)
        own = Member(name=name, host=host, port=links.port, incarnation=secrets.token_hex(16), data_port=data_port)
        membership = cls(own, links, silence_s)
        membership._thread.start()
        return membership

    @property
    def ending(self) -> str | None:
        """Why the present epoch ends, or None while it lasts. Cheap, to be read as often as one likes.

        Only where this process stood still for longer than `silence_s` it waits until the others have said whether the
        epoch still lasts.
        """
        if self._protocol.unsure and threading.current_thread() is not self._thread:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or not self._protocol.unsure)
        return self._protocol.ending

    @property
    def may_write(self) -> bool:
        """Whether this process is in the run as far as it can know: not so where it stood still and nobody said so yet.

        Waits as `ending` does. It stays true while an epoch ends that this process has seen to its end.
        """
        return (self.ending is None or not self._protocol.doubted) and self._protocol.failure is None

    @property
    def events(self) -> deque[MembershipEvent]:
        """What has happened, for a log; whoever reads may remove."""
        return self._protocol.events

    @property
    def members(self) -> Sequence[Member]:
        """Who is in the present epoch, in order.

        Raises:
            CommunicationError: there is none yet.
        """
        with self._changed:
            return self._present()[0].members

    @property
    def applicants(self) -> Sequence[Member]:
        """Who wants to join, and can at the next change of epochs."""
        with self._changed:
            return self._protocol.newcomers(self._present()[0].members)

    def begin(self, members: Sequence[Member], limit_s: float) -> Epoch:
        """Connect to all members, in the order that all of them give, and return epoch 0.

        It may have ended already, if one is lost meanwhile.

        Raises:
            CommunicationError: some did not come within `limit_s`, or have no address.
        """
        epoch = Epoch(number=0, members=tuple(members))
        others = [member for member in members if member != self.own]
        protocol = self._protocol
        for member in others:
            address_of(member)

        def missing() -> Sequence[Member]:
            return [member for member in others if member.incarnation not in protocol.heard]

        def all_came() -> bool:
            return protocol.epoch is not None and (protocol.ending is not None or not missing())

        deadline_s = time.monotonic() + limit_s
        with self._changed:
            self._call(lambda: protocol.begin(epoch))
            while not self._wait(all_came, min(_LOOK_S, max(0.0, deadline_s - time.monotonic()))):
                if time.monotonic() > deadline_s:
                    break
                # All ports are open by now: one that refuses a connection belongs to a process that has died.
                self._call(lambda: self._suspect([member.name for member in missing()]))
            if protocol.ending is None and missing():
                places = ", ".join(f"{member.name} ({member.host}:{member.port})" for member in missing())
                raise CommunicationError(f"no connection with {places} within {limit_s:g} s; the run cannot begin")
            self._call(self._links.expect_all)
            protocol.note("begun", self.own.name, f"with {len(members)} members")
            return epoch

    def join(self, contacts: Sequence[tuple[str, int]], limit_s: float) -> Epoch:
        """Ask members of a run that is under way to take this process in; return the first epoch with it.

        Args:
            contacts: host and port of any members; one that lives is enough.
            limit_s: how long it may take.

        Raises:
            CommunicationError: it did not happen within `limit_s`, or a host has no address.
        """
        asked = [Member(name=f"{host}:{port}", host=host, port=port, incarnation=_NOBODY) for host, port in contacts]
        for contact in asked:
            address_of(contact)
        deadline_s = time.monotonic() + limit_s
        with self._changed:
            while self._protocol.epoch is None:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    places = ", ".join(contact.name for contact in asked)
                    raise CommunicationError(f"nobody at {places} has taken this process in within {limit_s:g} s")
                self._call(lambda: self._protocol.apply(asked))
                self._wait(lambda: self._protocol.epoch is not None, min(_APPLY_S, left_s))
            return self._protocol.epoch

    def suspect(self, name: str, words: str) -> None:
        """Look closely at a member because a transfer to it failed; nothing ends if it lives."""
        logger.info("%s is suspected: %s", name, words)
        with self._changed:
            self._call(lambda: self._suspect([name]))

    def end_epoch(self, words: str) -> None:
        """End the present epoch for all members, without a loss."""
        with self._changed:
            number = self._present()[0].number
            self._call(lambda: self._protocol.end(words, number))

    def next_epoch(self, report: JsonValue, decide: Decide, limit_s: float) -> Epoch:
        """Wait for the next epoch; every member that lives calls this once the present one has ended.

        Args:
            report: where this process stands; whoever proposes gets the reports of all.
            decide: called in this thread of the one that proposes, perhaps again if a member is lost meanwhile.
            limit_s: how long all of it may take.

        Raises:
            LeftOutError: the others went on without this process.
            MinorityError: too few reach each other.
            CommunicationError: some gave no answer within `limit_s` though they live.
        """
        deadline_s = time.monotonic() + limit_s
        answered: Question | None = None
        decision: dict[str, JsonValue] = {}
        with self._changed:
            epoch, vote = self._present()
            self._call(lambda: self._protocol.end(f"{self.own.name} waits for the next epoch", epoch.number))
            self._post(vote.ready(report))
            while True:
                question = self._next_question(epoch, vote, answered, deadline_s, limit_s)
                if question is None:
                    return self._present()[0]
                question = question.beside(self._newcomers(epoch))
                if answered is None or answered[1:] != question[1:]:
                    self._changed.release()
                    try:
                        decision = decide(question.members, question.reports)
                    finally:
                        self._changed.acquire()
                answered = question
                self._post(vote.decide(question, decision))

    def leave(self) -> None:
        """End in good order: the others see that this process left.

        It first waits until all of them know of the present epoch: of who knows it, nobody else may be left to tell.
        """
        protocol = self._protocol
        with self._changed:
            self._changed.wait_for(lambda: self._closed or protocol.failure or not protocol.behind(), _FAREWELL_S)
        self._finish("leave")

    def close(self) -> None:
        """End without a word, as after an error; the others see that the connection is closed."""
        self._finish("close")

    # What the application's threads share with this object's, all under the lock

    def _present(self) -> tuple[Epoch, EpochVote]:
        if self._protocol.epoch is None or self._protocol.vote is None:
            raise CommunicationError("the membership has not begun")
        return self._protocol.epoch, self._protocol.vote

    def _next_question(
        self, epoch: Epoch, vote: EpochVote, answered: Question | None, deadline_s: float, limit_s: float
    ) -> Question | None:
        """Return the question to be answered next, or None once there is another epoch."""

        def asked() -> Question | None:
            question = vote.question
            return None if question is None or (answered and question.ballot == answered.ballot) else question

        def happened() -> bool:
            return self._protocol.epoch is not epoch or vote.stuck is not None or asked() is not None

        in_time = self._wait(happened, max(0.0, deadline_s - time.monotonic()))
        if self._protocol.epoch is not epoch:
            return None
        if vote.stuck is not None:
            raise MinorityError(f"{self._protocol.ending}; {vote.stuck}, so they do not go on")
        if not in_time:
            raise CommunicationError(f"{', '.join(vote.awaited)} did not agree on the next epoch within {limit_s:g} s")
        return asked()

    def _newcomers(self, epoch: Epoch) -> Sequence[Member]:
        """Return the applicants, once the connections to them stand: one that is left out costs an epoch more."""

        def missing() -> set[str]:
            standing = {member.name for member in self._protocol.newcomers(epoch.members)}
            return self._protocol.applicants.keys() - epoch.names - standing

        self._wait(lambda: self._protocol.epoch is not epoch or not missing(), _CONNECT_S)
        return self._protocol.newcomers(epoch.members)

    def _wait(self, happened: Callable[[], bool], limit_s: float) -> bool:
        in_time = self._changed.wait_for(lambda: self._protocol.failure is not None or happened(), limit_s)
        if self._protocol.failure is not None:
            raise self._protocol.failure
        return in_time

    def _call(self, call: Callable[[], None]) -> None:
        """Let the thread do something under the lock: the connections are its own."""
        self._calls.append(call)
        if not self._closed:
            self._links.wake()

    def _suspect(self, names: Sequence[str]) -> None:
        for name in names:
            self._links.suspect(name)

    def _post(self, outgoing: Outgoing) -> None:
        self._call(lambda: self._protocol.post(outgoing))

    def _finish(self, how: Literal["leave", "close"]) -> None:
        with self._changed:
            self._closing = self._closing or how
            if not self._closed:
                self._links.wake()
        self._thread.join()

    # The thread

    def _run(self) -> None:
        try:
            while self._closing is None:
                self._turn()
            with self._changed:
                self._work_off()
                if self._closing == "leave":
                    self._protocol.tell_all(Leave())
        except Exception as error:
            logger.exception("the membership's thread failed")
            self._fail(CommunicationError(f"the membership's thread failed: {error}"))
        finally:
            with self._changed:
                self._closed = True
                self._links.close(last_words=self._closing == "leave")
                self._changed.notify_all()

    def _turn(self) -> None:
        protocol = self._protocol
        news = list(self._links.news(_TURN_S if protocol.ending is not None else self._idle_turn_s))
        with self._changed:
            epoch, ending = protocol.epoch, protocol.ending
            self._work_off()
            protocol.turn(news)
            self._changed.notify_all()
            ended = protocol.ending is not None and (ending is None or protocol.epoch is not epoch)
        if ended and protocol.ending is not None and self.on_end is not None:
            self.on_end(protocol.ending)

    def _work_off(self) -> None:
        while self._calls:
            calls, self._calls = self._calls, []
            for call in calls:
                call()

    def _fail(self, error: SkipPipeError) -> None:
        with self._changed:
            self._protocol.failure = self._protocol.failure or error
            self._protocol.ending = self._protocol.ending or str(error)
