"""How the members of an epoch agree on the next one: Paxos for one value, without I/O and without a clock.

Acceptors are the members of the epoch; the value is the next epoch. A quorum of a ballot is

- a majority of the members, or half of them with the first one, or
- everyone but those who were dead for certain before the ballot began.

The second lets a minority go on where the others are known to be dead, even one alone. It is safe because a proposer
tells who is dead, so that nobody who promised takes late words of theirs, and because everyone who lives and knows a
decision tells it in phase 1: so no two living members ever hold different next epochs. Silence is no death: those whom
nobody reaches may live on, and count against a majority.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pydantic import JsonValue

from skippipe.membership.epoch import Epoch, Member
from skippipe.membership.messages import (
    Acceptance,
    Accepted,
    Ballot,
    Decided,
    Prepare,
    Promise,
    Proposal,
    Refusal,
    VoteMessage,
)

Outgoing = list[tuple[str, VoteMessage]]
"""Receivers' names and what to send them."""
_PATIENCE_TURNS = 5
"""Calls of `resend` before a member bids against a ballot that seems stuck; one more for each position in order."""


class Question(NamedTuple):
    """What a proposer asks its application: what to decide for these members, given what each reports."""

    ballot: Ballot
    members: Sequence[Member]
    reports: Mapping[str, JsonValue]

    def beside(self, newcomers: Sequence[Member]) -> "Question":
        """Return the question for these members too, of whom there is no report."""
        return self._replace(members=[*self.members, *newcomers])


@dataclass
class _Campaign:
    ballot: Ballot
    dead: frozenset[str]
    promises: dict[str, Promise] = field(default_factory=dict)
    value: Epoch | None = None
    acceptances: set[str] = field(default_factory=set)


class EpochVote:
    """One member's part in the vote on what follows `epoch`.

    Every method returns the messages to be sent; any of them may be lost, doubled or late.
    """

    decided: Epoch | None = None

    def __init__(self, epoch: Epoch, own: str):
        self._epoch = epoch
        self._names = epoch.names
        self._own = own
        self._position = self._names.index(own)
        self._dead: set[str] = set()
        self._silent: set[str] = set()
        self._report: JsonValue = None
        self._ready = False
        self._postponed: tuple[str, Prepare] | None = None
        self._promised: Ballot = (0, 0)
        self._accepted: Accepted | None = None
        self._answer: Outgoing = []
        self._campaign: _Campaign | None = None
        self._patience = 0
        self._asked = 0

    @property
    def reachable(self) -> Sequence[str]:
        """Members that are neither dead nor silent, in order; always this one."""
        return [name for name in self._names if name not in self._dead | self._silent]

    @property
    def question(self) -> Question | None:
        """What the application must decide now, where this member proposes and all whom it reaches have promised."""
        campaign = self._campaign
        if campaign is None or campaign.value is not None or not self._promised_by_all(campaign):
            return None
        if not self._is_quorum(campaign.promises, campaign.dead):
            return None
        names = _without_cut_links([name for name in self._names if name in campaign.promises], campaign.promises)
        members = [member for member in self._epoch.members if member.name in names]
        return Question(campaign.ballot, members, {name: campaign.promises[name].report for name in names})

    @property
    def stuck(self) -> str | None:
        """Why those whom this member reaches cannot go on; None while they may."""
        campaign = self._campaign
        if campaign is None or not self._promised_by_all(campaign):
            return None
        if self._is_quorum(campaign.promises, campaign.dead):
            return None
        silent = ", ".join(name for name in self._names if name in self._silent)
        return (
            f"{len(campaign.promises)} of {len(self._names)} members reach each other "
            f"({', '.join(self.reachable)}); {silent} may live on without them"
        )

    @property
    def awaited(self) -> Sequence[str]:
        """Whom this member waits for: those who have not promised, or else the proposer."""
        if self._campaign is None:
            return self.reachable[:1]
        return [name for name in self.reachable if name not in self._campaign.promises]

    def ready(self, report: JsonValue) -> Outgoing:
        """The application waits for the next epoch and reports where it stands."""
        self._report = report
        self._ready = True
        postponed, self._postponed = self._postponed, None
        return self.receive(*postponed) if postponed else self._lead()

    def lost(self, name: str, *, dead: bool) -> Outgoing:
        """A member is dead for certain, or silent."""
        if name == self._own or name in self._dead or (not dead and name in self._silent):
            return []
        (self._dead if dead else self._silent).add(name)
        self._campaign = None  # its dead are those of its beginning, so a new ballot
        self._patience = 0
        return self._lead()

    def decide(self, question: Question, decision: dict[str, JsonValue]) -> Outgoing:
        """The application's answer to a question; one that is out of date changes nothing."""
        campaign = self._campaign
        if campaign is None or campaign.ballot != question.ballot or self.question is None:
            return []
        value = Epoch(number=self._epoch.number + 1, members=tuple(question.members), decision=decision)
        return self._propose(campaign, value)

    def resend(self) -> Outgoing:
        """Say again what has had no answer, and ask one after the other who may know the decision.

        To be called a few times a second while the vote lasts.
        """
        self._patience = max(0, self._patience - 1)
        campaign = self._campaign
        if self.decided is not None or not self._ready:
            return []
        if campaign is None:
            self._asked += 1
            others = [name for name in self.reachable if name != self._own]
            asked = [(others[self._asked % len(others)], self._refusal())] if others else []
            return [*self._answer, *asked, *self._lead()]
        if campaign.value is None:
            return [(name, self._prepare(campaign)) for name in self.awaited]
        return self._to_others(self._proposal(campaign, campaign.value), but=campaign.acceptances)

    def receive(self, sender: str, message: VoteMessage) -> Outgoing:
        """Take a message from a member of the epoch, or the decision from anyone."""
        if sender in self._dead:
            return []  # it is late: those who live may have begun a ballot without the dead
        if isinstance(message, Decided):
            self.decided = self.decided or message.value
            self._campaign = None
            return []
        if self.decided is not None:
            return [(sender, Decided(epoch=message.epoch, value=self.decided))]
        match message:
            case Prepare():
                return self._promise(sender, message)
            case Proposal():
                return self._accept(sender, message)
            case Refusal() if self._campaign and message.ballot > self._campaign.ballot:
                self._yield_to(message.ballot)
            case Promise() if self._is_current(message.ballot):
                self._running.promises.setdefault(sender, message)
                return self._advance()
            case Acceptance() if self._is_current(message.ballot):
                self._running.acceptances.add(sender)
                return self._advance()
        return []

    # As acceptor

    def _promise(self, sender: str, message: Prepare) -> Outgoing:
        if message.ballot < self._promised:
            return [(sender, self._refusal())]
        if not self._ready:
            if self._postponed is None or self._postponed[1].ballot <= message.ballot:
                self._postponed = (sender, message)
            return []
        self._dead.update(name for name in message.dead if name != self._own)
        self._yield_to(message.ballot)
        self._promised = message.ballot
        self._answer = [(sender, self._own_promise())]
        return self._answer

    def _accept(self, sender: str, message: Proposal) -> Outgoing:
        if message.ballot < self._promised:
            return [(sender, self._refusal())]
        self._yield_to(message.ballot)
        self._promised = message.ballot
        self._accepted = Accepted(ballot=message.ballot, value=message.value)
        self._answer = [(sender, Acceptance(epoch=self._epoch.number, ballot=message.ballot))]
        return self._answer

    def _refusal(self) -> Refusal:
        return Refusal(epoch=self._epoch.number, ballot=self._promised)

    def _own_promise(self) -> Promise:
        silent = tuple(name for name in self._names if name in self._silent)
        return Promise(
            epoch=self._epoch.number,
            ballot=self._promised,
            report=self._report,
            silent=silent,
            accepted=self._accepted,
        )

    # As proposer

    def _lead(self) -> Outgoing:
        """Begin a ballot where this member is the first that is reachable, and nobody else's is under way."""
        if self.decided or not self._ready or self._campaign or self._patience or self.reachable[0] != self._own:
            return []
        self._promised = (self._promised[0] + 1, self._position)
        self._campaign = campaign = _Campaign(self._promised, frozenset(self._dead))
        campaign.promises[self._own] = self._own_promise()
        self._answer = []
        return [*self._to_others(self._prepare(campaign)), *self._advance()]

    def _yield_to(self, ballot: Ballot) -> None:
        if ballot > self._promised:
            self._promised = ballot
            self._campaign = None
        self._patience = _PATIENCE_TURNS + self._position

    def _advance(self) -> Outgoing:
        campaign = self._running
        if campaign.value is None:
            earlier = [promise.accepted for promise in campaign.promises.values() if promise.accepted]
            if earlier and self._promised_by_all(campaign) and self._is_quorum(campaign.promises, campaign.dead):
                return self._propose(campaign, max(earlier, key=lambda accepted: accepted.ballot).value)
            return []
        if not self._is_quorum(campaign.acceptances, campaign.dead):
            return []
        self.decided = campaign.value
        self._campaign = None
        announced = Decided(epoch=self._epoch.number, value=campaign.value)
        return [(name, announced) for name in self._names if name != self._own and name not in self._dead]

    def _propose(self, campaign: _Campaign, value: Epoch) -> Outgoing:
        campaign.value = value
        campaign.acceptances.add(self._own)
        self._accepted = Accepted(ballot=campaign.ballot, value=value)
        return [*self._to_others(self._proposal(campaign, value)), *self._advance()]

    def _prepare(self, campaign: _Campaign) -> Prepare:
        return Prepare(epoch=self._epoch.number, ballot=campaign.ballot, dead=tuple(sorted(campaign.dead)))

    def _proposal(self, campaign: _Campaign, value: Epoch) -> Proposal:
        return Proposal(epoch=self._epoch.number, ballot=campaign.ballot, value=value)

    def _to_others(self, message: VoteMessage, but: set[str] | None = None) -> Outgoing:
        return [(name, message) for name in self.reachable if name != self._own and name not in (but or ())]

    @property
    def _running(self) -> _Campaign:
        assert self._campaign is not None
        return self._campaign

    def _is_current(self, ballot: Ballot) -> bool:
        return self._campaign is not None and self._campaign.ballot == ballot

    def _promised_by_all(self, campaign: _Campaign) -> bool:
        return campaign.promises.keys() >= set(self.reachable)

    def _is_quorum(self, names: "Mapping[str, Promise] | set[str]", dead: frozenset[str]) -> bool:
        half = len(self._names) / 2
        if len(names) > half or (len(names) == half and self._names[0] in names):
            return True
        return set(names) >= set(self._names) - dead


def _without_cut_links(names: Sequence[str], promises: Mapping[str, Promise]) -> Sequence[str]:
    """Leave out whom the most others do not reach, later ones first, until all of the rest reach each other."""
    left = list(names)
    while left:
        cut = {name: {other for other in left if _is_cut(promises, name, other)} for name in left}
        worst = max(reversed(left), key=lambda name: len(cut[name]))
        if not cut[worst]:
            break
        left.remove(worst)
    return left


def _is_cut(promises: Mapping[str, Promise], first: str, second: str) -> bool:
    return second in promises[first].silent or first in promises[second].silent
