"""One process's membership in a run: what the application calls, and the thread that speaks with the others."""

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Self

from pydantic import JsonValue

from skippipe.errors import CommunicationError, LeftOutError, MinorityError, SkipPipeError
from skippipe.membership.epoch import Epoch, Member
from skippipe.membership.epoch_vote import EpochVote, Outgoing, Question
from skippipe.membership.keys import run_keys
from skippipe.membership.links import Connected, LinkNews, Links, MemberLost, Received
from skippipe.membership.member_link import Loss
from skippipe.membership.messages import (
    Acceptance,
    Decided,
    Envelope,
    EpochEnd,
    Hello,
    Leave,
    Message,
    Mistaken,
    Prepare,
    Promise,
    Proposal,
    Refusal,
    VoteMessage,
)

logger = logging.getLogger(__name__)
Decide = Callable[[Sequence[Member], Mapping[str, JsonValue]], dict[str, JsonValue]]
"""What the application decides for the next epoch, from its members in order and the report of each."""
_TURN_S = 0.1
_RESEND_S = 0.2
_EVENTS = 10_000


What = Literal["begun", "lost", "ended", "agreed", "left out"]


class MembershipEvent(NamedTuple):
    """Something that happened, for a log. `seconds`: how long detection (`lost`) or agreement (`agreed`) took."""

    what: What
    name: str
    words: str
    seconds: float


class Membership:
    """A process in a run, from `open` to `leave` or `close`.

    An epoch ends when a member is lost or leaves, or when one asks for it; `ending` says why, and `on_end` is called
    once, from this object's thread. All who live then call `next_epoch`. A process must not go on in an epoch that has
    ended, nor write anything that outlives it.
    """

    def __init__(self, own: Member, links: Links, silence_s: float):
        self.own = own
        self.on_end: Callable[[str], None] | None = None
        self.events: deque[MembershipEvent] = deque(maxlen=_EVENTS)
        self._links = links
        self._silence_s = silence_s
        self._changed = threading.Condition()
        self._epoch: Epoch | None = None
        self._vote: EpochVote | None = None
        self._ending: str | None = None
        self._ended_s = 0.0
        self._failure: SkipPipeError | None = None
        self._heard: set[str] = set()
        self._calls: list[Callable[[], None]] = []
        self._closing: Literal["leave", "close"] | None = None
        self._resent_s = self._greeted_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="membership", daemon=True)

    @classmethod
    def open(cls, name: str, host: str, secret: str, silence_s: float = 5.0) -> Self:
        """Bind a port, under which others reach this process at `host`; whoever holds `secret` may.

        A member is silent after `silence_s` without a sign of life, and noticed so within a second more.

        Raises:
            ConfigError: the secret is too short.
        """
        links = Links(run_keys(secret), silence_s)
        own = Member(name=name, host=host, port=links.port, incarnation=secrets.token_hex(16))
        membership = cls(own, links, silence_s)
        membership._thread.start()
        return membership

    @property
    def ending(self) -> str | None:
        """Why the present epoch ends, or None while it lasts. Cheap: to be read as often as one likes."""
        return self._ending

    def begin(self, members: Sequence[Member], limit_s: float) -> Epoch:
        """Connect to all members, in the order that all of them give, and return epoch 0.

        It may have ended already, if one is lost meanwhile.

        Raises:
            CommunicationError: some did not come within `limit_s`.
        """
        epoch = Epoch(number=0, members=tuple(members))
        others = {member.incarnation for member in members if member != self.own}
        with self._changed:
            self._epoch = epoch
            self._vote = EpochVote(epoch, self.own.name)
            self._call(lambda: self._connect(epoch))
            self._changed.wait_for(lambda: self._ending or self._failure or others <= self._heard, limit_s)
            if self._failure is not None:
                raise self._failure
            missing = [member for member in members if member.incarnation in others - self._heard]
            if missing and self._ending is None:
                places = ", ".join(f"{member.name} ({member.host}:{member.port})" for member in missing)
                raise CommunicationError(f"no connection with {places} within {limit_s:g} s; the run cannot begin")
            self._call(self._links.expect_all)
            self._note("begun", self.own.name, f"with {len(members)} members", 0.0)
            return epoch

    def suspect(self, name: str, words: str) -> None:
        """Look closely at a member because a transfer to it failed; nothing ends if it lives."""
        logger.info("%s is suspected: %s", name, words)
        with self._changed:
            self._call(lambda: self._links.suspect(name))

    def end_epoch(self, words: str) -> None:
        """End the present epoch for all members, without a loss."""
        with self._changed:
            self._call(lambda: self._end(words))

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
            self._call(lambda: self._end(f"{self.own.name} waits for the next epoch"))
            self._post(vote.ready(report))
            while True:
                question = self._wait_for_vote(epoch, vote, answered, deadline_s - time.monotonic(), limit_s)
                if question is None:
                    return self._present()[0]
                if answered is None or answered[1:] != question[1:]:
                    self._changed.release()
                    try:
                        decision = decide(question.members, question.reports)
                    finally:
                        self._changed.acquire()
                answered = question
                self._post(vote.decide(question, decision))

    def leave(self) -> None:
        """End in good order: the others see that this process left."""
        self._finish("leave")

    def close(self) -> None:
        """End without a word, as after an error; the others see that the connection is closed."""
        self._finish("close")

    # What the application's threads share with this object's, all under the lock

    def _present(self) -> tuple[Epoch, EpochVote]:
        if self._epoch is None or self._vote is None:
            raise CommunicationError("the membership has not begun")
        return self._epoch, self._vote

    def _wait_for_vote(
        self, epoch: Epoch, vote: EpochVote, answered: Question | None, wait_s: float, limit_s: float
    ) -> Question | None:
        """Return the question to be answered next, or None once there is another epoch."""

        def happened() -> bool:
            question = vote.question
            asked = question is not None and (answered is None or question.ballot != answered.ballot)
            return asked or self._epoch is not epoch or self._failure is not None or vote.stuck is not None

        in_time = self._changed.wait_for(happened, max(0.0, wait_s))
        if self._failure is not None:
            raise self._failure
        if self._epoch is not epoch:
            return None
        if vote.stuck is not None:
            raise MinorityError(f"{self._ending}; {vote.stuck}, so they do not go on")
        if not in_time:
            raise CommunicationError(f"{', '.join(vote.awaited)} did not agree on the next epoch within {limit_s:g} s")
        return vote.question

    def _call(self, call: Callable[[], None]) -> None:
        """Let the thread do something under the lock: the connections are its own."""
        self._calls.append(call)
        self._links.wake()

    def _post(self, outgoing: Outgoing) -> None:
        for name, message in outgoing:
            self._send(name, message)

    def _send(self, name: str, message: Message) -> None:
        envelope = Envelope(sender=self.own, message=message)
        self._call(lambda: self._links.send(name, envelope))

    def _note(self, what: What, name: str, words: str, seconds: float) -> None:
        self.events.append(MembershipEvent(what, name, words, seconds))

    def _finish(self, how: Literal["leave", "close"]) -> None:
        with self._changed:
            if self._closing is None:
                self._closing = how
                self._links.wake()
        self._thread.join()

    # The thread

    def _run(self) -> None:
        try:
            while self._closing is None:
                news = list(self._links.news(_TURN_S))
                before = self._ending
                with self._changed:
                    self._turn(news)
                    self._changed.notify_all()
                if before is None and self._ending is not None and self.on_end is not None:
                    self.on_end(self._ending)
            with self._changed:
                self._work_off()
                if self._closing == "leave" and self._epoch is not None:
                    self._tell_all(Leave())
                    self._work_off()
        except Exception as error:
            logger.exception("the membership's thread failed")
            with self._changed:
                self._failure = CommunicationError(f"the membership's thread failed: {error}")
                self._ending = self._ending or str(self._failure)
                self._changed.notify_all()
        finally:
            self._links.close(last_words=self._closing == "leave")

    def _turn(self, news: Sequence[LinkNews]) -> None:
        self._work_off()
        for item in news:
            match item:
                case Connected(name):
                    self._greet(name)
                case MemberLost(name, loss):
                    self._lose(name, loss)
                case Received(envelope, way_back):
                    self._take(envelope, way_back)
        self._say_again()
        self._work_off()
        if self._vote is not None and self._vote.decided is not None and self._failure is None:
            self._install(self._vote.decided)
            self._work_off()

    def _work_off(self) -> None:
        while self._calls:
            calls, self._calls = self._calls, []
            for call in calls:
                call()

    def _say_again(self) -> None:
        now_s = time.monotonic()
        if self._vote is None or self._epoch is None:
            return
        if self._ending is not None and now_s - self._resent_s > _RESEND_S:
            self._resent_s = now_s
            self._post(self._vote.resend())
        if now_s - self._greeted_s > self._silence_s:  # also after this process was stopped: it may be out
            self._greeted_s = now_s
            for name in self._links.members:
                self._greet(name)

    def _connect(self, epoch: Epoch) -> None:
        for member in epoch.members:
            if member != self.own:
                self._links.connect(member)

    def _greet(self, name: str) -> None:
        if self._epoch is not None:
            self._send(name, Hello(epoch=self._epoch.number, receiver=self._links.members[name].incarnation))

    def _lose(self, name: str, loss: Loss) -> None:
        self._note("lost", name, loss.words, loss.detection_s)
        self._end(f"{name} lost ({loss.words})")
        if self._vote is not None and self._epoch is not None and name in self._epoch.names:
            self._post(self._vote.lost(name, dead=loss.dead))

    def _end(self, words: str) -> None:
        if self._ending is None and self._epoch is not None:
            self._ending = words
            self._ended_s = time.monotonic()
            self._note("ended", self.own.name, words, 0.0)
            self._links.expect_all()
            self._tell_all(EpochEnd(epoch=self._epoch.number, words=words))

    def _tell_all(self, message: Message) -> None:
        for name in self._links.members:
            self._send(name, message)

    def _take(self, envelope: Envelope, way_back: bytes | None) -> None:
        sender, message = envelope.sender, envelope.message
        if isinstance(message, Hello):
            if message.receiver != self.own.incarnation:
                self._reply(way_back, Mistaken(receiver=message.receiver))
                return
            self._heard.add(sender.incarnation)
        if self._epoch is None:
            return
        known = sender in self._epoch.members
        present = message.epoch == self._epoch.number if not isinstance(message, Mistaken | Leave) else known
        match message:
            case Mistaken():
                for name, member in self._links.members.items():
                    if member.incarnation == message.receiver:
                        self._lose_for_certain(name, "another process has its address")
            case Leave() if known:
                self._lose_for_certain(sender.name, "left")
            case EpochEnd() if known and present:
                self._end(message.words)
            case Decided() if present and message.value.number > self._epoch.number:
                self._take_vote(sender.name, message)
            case Hello() if known and present and self._ending is not None:
                self._reply(way_back, EpochEnd(epoch=message.epoch, words=self._ending))
            case Prepare() | Promise() | Proposal() | Acceptance() | Refusal() if known and present:
                self._take_vote(sender.name, message)
            case Hello() | Prepare() | Promise() | Proposal() | Acceptance() | Refusal():
                if not known or message.epoch < self._epoch.number:
                    ballot = (0, 0) if isinstance(message, Hello) else message.ballot
                    self._reply(way_back, Decided(epoch=message.epoch, ballot=ballot, value=self._epoch))

    def _take_vote(self, sender: str, message: VoteMessage) -> None:
        assert self._vote is not None
        if not isinstance(message, Refusal):
            self._end(f"{sender} waits for the next epoch")
        self._post(self._vote.receive(sender, message))

    def _lose_for_certain(self, name: str, words: str) -> None:
        loss = self._links.note_dead(name, words)
        if loss is not None:
            self._lose(name, loss)

    def _reply(self, way_back: bytes | None, message: Message) -> None:
        self._links.reply(way_back, Envelope(sender=self.own, message=message))

    def _install(self, epoch: Epoch) -> None:
        names = ", ".join(epoch.names)
        if self.own not in epoch.members:
            self._failure = LeftOutError(
                f"the run has gone on without {self.own.name}, which the others did not reach; "
                f"in it are {names} (epoch {epoch.number})"
            )
            self._note("left out", self.own.name, names, time.monotonic() - self._ended_s)
            return
        self._epoch, self._vote, self._ending = epoch, EpochVote(epoch, self.own.name), None
        self._note("agreed", self.own.name, f"epoch {epoch.number}: {names}", time.monotonic() - self._ended_s)
        self._links.drop([name for name, member in self._links.members.items() if member not in epoch.members])
        self._connect(epoch)
        for name, loss in self._links.losses.items():
            self._lose(name, loss)
