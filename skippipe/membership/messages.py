"""What members tell each other, as checked JSON."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from skippipe.membership.epoch import Checked, Epoch, Member

Ballot = tuple[int, int]
"""Round and position of the proposer among the epoch's members: no two proposers have one in common."""


class Prepare(Checked):
    """A proposer asks for promises."""

    kind: Literal["prepare"] = "prepare"
    epoch: int
    ballot: Ballot
    dead: tuple[str, ...]
    """Who was dead for certain before the ballot began."""


class Accepted(Checked):
    """The last proposal that a member accepted."""

    ballot: Ballot
    value: Epoch


class Promise(Checked):
    """A member answers no lower ballot any more."""

    kind: Literal["promise"] = "promise"
    epoch: int
    ballot: Ballot
    report: JsonValue
    silent: tuple[str, ...]
    """Whom this member does not reach."""
    accepted: Accepted | None


class Proposal(Checked):
    """A proposer asks to accept the next epoch."""

    kind: Literal["proposal"] = "proposal"
    epoch: int
    ballot: Ballot
    value: Epoch


class Acceptance(Checked):
    """A member has accepted the proposal of this ballot."""

    kind: Literal["acceptance"] = "acceptance"
    epoch: int
    ballot: Ballot


class Refusal(Checked):
    """A member has promised itself to a higher ballot."""

    kind: Literal["refusal"] = "refusal"
    epoch: int
    ballot: Ballot


class Decided(Checked):
    """The next epoch, or a later one where the receiver is further behind."""

    kind: Literal["decided"] = "decided"
    epoch: int
    value: Epoch


VoteMessage = Prepare | Promise | Proposal | Acceptance | Refusal | Decided


class Hello(Checked):
    """A sign of life, said on every new connection and now and then."""

    kind: Literal["hello"] = "hello"
    epoch: int
    receiver: str
    """The incarnation that is meant."""
    asks: Annotated[str, Field(max_length=32)] = ""
    """The receiver is asked to say these words, if the epoch still lasts."""
    answers: Annotated[str, Field(max_length=32)] = ""


class Mistaken(Checked):
    """Another incarnation than the one that was meant has the address: that one is dead."""

    kind: Literal["mistaken"] = "mistaken"
    receiver: str


class EpochEnd(Checked):
    """The epoch ends, because of a loss or because a member asks for it."""

    kind: Literal["end"] = "end"
    epoch: int
    words: Annotated[str, Field(max_length=2000)]


class Leave(Checked):
    """The sender has ended in good order."""

    kind: Literal["leave"] = "leave"


class Application(Checked):
    """A process wants to join the run; told by itself, or by the member that it told."""

    kind: Literal["application"] = "application"
    applicant: Member


Message = VoteMessage | Hello | Mistaken | EpochEnd | Leave | Application


class Envelope(Checked):
    """One message and who sends it."""

    sender: Member
    message: Annotated[Message, Field(discriminator="kind")]
