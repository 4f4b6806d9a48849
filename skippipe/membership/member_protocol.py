"""What a member does about losses and messages, between the connections below and the application above."""

import logging
import secrets
import time
from collections import deque
from collections.abc import Sequence
from typing import Literal, NamedTuple

from skippipe.errors import CommunicationError, LeftOutError, SkipPipeError
from skippipe.membership.epoch import Epoch, Member
from skippipe.membership.epoch_vote import EpochVote, Outgoing
from skippipe.membership.links import Connected, LinkNews, Links, MemberLost, Received
from skippipe.membership.member_link import Loss
from skippipe.membership.messages import (
    Acceptance,
    Application,
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
_RESEND_S = 0.2
_EVENTS = 10_000
What = Literal["begun", "lost", "ended", "agreed", "left out", "applied"]


class MembershipEvent(NamedTuple):
    """Something that happened, for a log. `seconds`: how long detection (`lost`) or agreement (`agreed`) took."""

    what: What
    name: str
    words: str
    seconds: float


class MemberProtocol:
    """The state of one member. One thread at a time uses it, as its connections.

    A process that stood still, frozen or starved, may be out of the run without knowing it: from then on it is `unsure`
    until a majority, asked afterwards, has said that the epoch still is as it was.
    """

    def __init__(self, own: Member, links: Links, silence_s: float):
        self.own = own
        self.links = links
        self.epoch: Epoch | None = None
        self.vote: EpochVote | None = None
        self.ending: str | None = None
        self.failure: SkipPipeError | None = None
        self.heard: dict[str, int] = {}
        """The latest epoch in which each incarnation has said hello."""
        self.applicants: dict[str, Member] = {}
        self.applying = False
        self.events: deque[MembershipEvent] = deque(maxlen=_EVENTS)
        self._silence_s = silence_s
        self._ended_s = 0.0
        self._resent_s = self._greeted_s = self.turned_s = time.monotonic()
        self.doubted = False
        """Whether this process stood still, and has not heard since then that it is in the run."""
        self._asked = ""
        self._confirming: set[str] = set()

    @property
    def unsure(self) -> bool:
        """Whether this process may have been left out without knowing it."""
        stood_still = time.monotonic() - self.turned_s > self._silence_s
        return self.epoch is not None and self.ending is None and (stood_still or bool(self._asked))

    def begin(self, epoch: Epoch) -> None:
        """Enter the first epoch."""
        self.epoch = epoch
        self.vote = EpochVote(epoch, self.own.name)
        self._connect(epoch.members)

    def apply(self, contacts: Sequence[Member]) -> None:
        """Ask these and whoever has heard of it from them to take this process in."""
        if not self.applying:
            self.applying = True
            self._connect(contacts)
        self.tell_all(Application(applicant=self.own))

    def turn(self, news: Sequence[LinkNews]) -> None:
        """Take what has happened, and say what is due."""
        unsure, self.turned_s = self.unsure, time.monotonic()
        if unsure and not self._asked:
            self._asked, self._confirming, self.doubted = secrets.token_hex(8), {self.own.name}, True
            self._greet_all()
        for item in news:
            match item:
                case Connected(name):
                    self._greet(name)
                case MemberLost(name, loss):
                    self._lose(name, loss)
                case Received(envelope, way_back):
                    self._take(envelope, way_back)
        if self.ending is not None and self.vote is not None and self.turned_s - self._resent_s > _RESEND_S:
            self._resent_s = self.turned_s
            self.post(self.vote.resend())
        if self.turned_s - self._greeted_s > self._silence_s:
            self._greet_all()
        if self.vote is not None and self.vote.decided is not None and self.failure is None:
            self._install(self.vote.decided)

    def end(self, words: str, number: int | None = None) -> None:
        """End the present epoch for all, or that of the number if it is the present one."""
        if self.ending is None and self.epoch is not None and number in (None, self.epoch.number):
            self.ending = words
            self._asked = ""
            self._ended_s = time.monotonic()
            self.note("ended", self.own.name, words)
            self.links.expect_all()
            self.tell_all(EpochEnd(epoch=self.epoch.number, words=words[:2000]))

    def post(self, outgoing: Outgoing) -> None:
        """Send what the vote has to say."""
        for name, message in outgoing:
            self._send(name, message)

    def tell_all(self, message: Message) -> None:
        """Send to everyone who is connected."""
        for name in self.links.members:
            self._send(name, message)

    def note(self, what: What, name: str, words: str, seconds: float = 0.0) -> None:
        """Keep an event for whoever logs them."""
        self.events.append(MembershipEvent(what, name, words, seconds))

    def behind(self) -> Sequence[str]:
        """Return which members of the present epoch live, and may not know yet that it has begun."""
        if self.epoch is None or self.vote is None:
            return []
        number, reachable = self.epoch.number, self.vote.reachable
        others = [member for member in self.epoch.members if member.name in reachable and member != self.own]
        return [member.name for member in others if self.heard.get(member.incarnation, -1) < number]

    def newcomers(self, members: Sequence[Member]) -> Sequence[Member]:
        """Return the applicants that can be taken in beside these."""
        names = {member.name for member in members}
        return [member for name, member in self.applicants.items() if name not in names and self.links.standing(name)]

    def _send(self, name: str, message: Message) -> None:
        self.links.send(name, Envelope(sender=self.own, message=message))

    def _reply(self, way_back: bytes | None, message: Message) -> None:
        self.links.reply(way_back, Envelope(sender=self.own, message=message))

    def _greet(self, name: str) -> None:
        if self.epoch is not None:
            receiver = self.links.members[name].incarnation
            self._send(name, Hello(epoch=self.epoch.number, receiver=receiver, asks=self._asked))

    def _greet_all(self) -> None:
        self._greeted_s = time.monotonic()
        for name in self.links.members:
            self._greet(name)

    def _connect(self, members: Sequence[Member]) -> None:
        for member in members:
            if member != self.own:
                try:
                    self.links.connect(member)
                except CommunicationError as error:
                    logger.warning("%s", error)
                    self._lose(member.name, Loss(False, str(error), 0.0))

    def _lose(self, name: str, loss: Loss) -> None:
        self.note("lost", name, loss.words, loss.detection_s)
        if self.applicants.pop(name, None) is not None:
            self.links.drop([name])
        elif self.epoch is not None and self.vote is not None and name in self.epoch.names:
            self.end(f"{name} lost ({loss.words})")
            self.post(self.vote.lost(name, dead=loss.dead))

    def _lose_for_certain(self, name: str, words: str) -> None:
        loss = self.links.note_dead(name, words)
        if loss is not None:
            self._lose(name, loss)

    def _take(self, envelope: Envelope, way_back: bytes | None) -> None:
        sender, message = envelope.sender, envelope.message
        match message:
            case Hello() if message.receiver != self.own.incarnation:
                self._reply(way_back, Mistaken(receiver=message.receiver))
            case Hello():
                self.heard[sender.incarnation] = max(message.epoch, self.heard.get(sender.incarnation, 0))
                if self.applying:
                    self._connect([sender])  # one more who can take this process in
                self._take_epochal(sender, message, way_back)
            case Mistaken():
                for name, member in self.links.members.items():
                    if member.incarnation == message.receiver:
                        self._lose_for_certain(name, "another process has its address")
            case Leave() if self.links.members.get(sender.name) == sender:
                self._lose_for_certain(sender.name, "left")
            case Application():
                self._take_application(message.applicant, told=message.applicant != sender)
            case Decided() if self.epoch is None:
                if self.own in message.value.members:
                    self._install(message.value)
            case Leave():
                pass
            case _:
                self._take_epochal(sender, message, way_back)

    def _take_epochal(self, sender: Member, message: VoteMessage | Hello | EpochEnd, way_back: bytes | None) -> None:
        """Take a message that belongs to an epoch; whoever is behind, or out, hears of the present one."""
        if self.epoch is None:
            return
        if isinstance(message, Decided):
            if message.epoch == self.epoch.number < message.value.number:  # perhaps from one that is new since then
                self._vote_on(sender.name if sender in self.epoch.members else sender.incarnation, message)
            return
        if message.epoch > self.epoch.number:
            return  # this member is behind, and will be told
        if message.epoch < self.epoch.number or sender not in self.epoch.members:
            if not isinstance(message, EpochEnd):
                self._reply(way_back, Decided(epoch=message.epoch, value=self.epoch))
            return
        match message:
            case EpochEnd():
                self.end(message.words)
            case Hello() if self.ending is not None:
                self._reply(way_back, EpochEnd(epoch=message.epoch, words=self.ending))
            case Hello():
                self._confirm(sender, message, way_back)
            case Prepare() | Promise() | Proposal() | Acceptance() | Refusal():
                self._vote_on(sender.name, message)

    def _confirm(self, sender: Member, message: Hello, way_back: bytes | None) -> None:
        if message.asks:
            own = self.epoch.number if self.epoch else 0
            self._reply(way_back, Hello(epoch=own, receiver=sender.incarnation, answers=message.asks))
        if self._asked and message.answers == self._asked and self.epoch is not None:
            self._confirming.add(sender.name)
            if 2 * len(self._confirming) > len(self.epoch.members):
                self._asked, self.doubted = "", False

    def _vote_on(self, sender: str, message: VoteMessage) -> None:
        assert self.vote is not None
        if isinstance(message, Prepare | Proposal):
            self.end(f"{sender} waits for the next epoch")
        self.post(self.vote.receive(sender, message))

    def _take_application(self, applicant: Member, *, told: bool) -> None:
        """Connect to one that wants to join, and tell the others of it; one whose name is still in use has to wait."""
        if self.epoch is None or applicant in self.epoch.members or applicant.name in self.epoch.names:
            if self.epoch is not None and applicant in self.epoch.members:
                self._send(applicant.name, Decided(epoch=-1, value=self.epoch))
            return
        if self.applicants.get(applicant.name) != applicant:
            self._connect([applicant])
            self.applicants[applicant.name] = applicant
            self.note("applied", applicant.name, f"{applicant.host}:{applicant.port}")
            if not told:
                self.tell_all(Application(applicant=applicant))

    def _install(self, epoch: Epoch) -> None:
        names = ", ".join(epoch.names)
        if self.own not in epoch.members:
            self.failure = LeftOutError(
                f"the run has gone on without {self.own.name}, which the others did not reach; "
                f"in it are {names} (epoch {epoch.number})"
            )
            self.note("left out", self.own.name, names)
            self.ending = self.ending or str(self.failure)
            return
        self.epoch, self.vote, self.ending = epoch, EpochVote(epoch, self.own.name), None
        self.applying = self.doubted = False
        self.note("agreed", self.own.name, f"epoch {epoch.number}: {names}", time.monotonic() - self._ended_s)
        arrived = [name for name, member in self.applicants.items() if member in epoch.members]
        self.applicants = {name: member for name, member in self.applicants.items() if name not in epoch.names}
        known = {*epoch.members, *self.applicants.values()}
        self.links.drop([name for name, member in self.links.members.items() if member not in known])
        self._connect(epoch.members)
        self.links.expect_all()
        self._greet_all()
        for name in arrived:
            self._send(name, Decided(epoch=-1, value=epoch))
        for name, loss in self.links.losses().items():
            self._lose(name, loss)
