"""How a process that comes later finds a run that is under way: by what its members left in a file or in a store."""

import logging
import socket
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal, NamedTuple

from pydantic import BaseModel, ValidationError

from skippipe.errors import CommunicationError, SkipPipeError
from skippipe.membership.download import Source, fetch
from skippipe.membership.epoch import Checked, Member
from skippipe.membership.keys import run_keys
from skippipe_scheduler.files import write_atomically

logger = logging.getLogger(__name__)
MEMBERS_FILE: Final = "members.json"
FACTS: Final = "run"
"""Under which name every member's exchange has what a newcomer needs to know of the run."""
_CONNECT_S = 2.0
"""How long one member may take to answer: a host that is gone refuses nothing."""
ANSWER_S = 5.0
_MOST_AT_ONCE = 32
MOST_BYTES = 2**28
"""What a newcomer takes at most; plans of thousands of nodes are some tens of MB."""


class Contacts(Checked):
    """Where members of a run can be reached, and what proves that one belongs to it."""

    format: Literal["skippipe.members/1"] = "skippipe.members/1"
    secret: str | None = None
    """None where it is that of SKIPPIPE_SECRET."""
    members: tuple[Member, ...]

    def as_note(self, own_secret: str | None) -> str:
        """Return the text for a place that others can read: without a secret that its readers have themselves."""
        note = self.model_copy(update={"secret": None}) if self.secret == own_secret else self
        return note.model_dump_json()

    def keep(self, run_dir: Path) -> None:
        """Write them into the run directory, readable for this user alone; a failure is logged."""
        try:
            write_atomically(run_dir / MEMBERS_FILE, self.model_dump_json(indent=1) + "\n", private=True)
        except SkipPipeError as reason:
            logger.warning("%s; who comes later has to be told", reason)


class LiveRun(NamedTuple):
    """A run that is under way."""

    secret: str
    members: Sequence[Member]
    """Those that answer."""
    facts: bytes
    """What one of them says of the run."""

    def fetch(self, name: str) -> bytes | None:
        """Return what a member that answers has ready under a name; None where none has."""
        for member in self.members:
            content = _fetched(self.secret, member, name)
            if content is not None:
                return content
        return None

    @property
    def contacts(self) -> Contacts:
        """How its members can be reached."""
        return Contacts(secret=self.secret, members=tuple(self.members))


def kept_contacts(run_dir: Path) -> list[str]:
    """Return the text that the members left in the run directory, if they did."""
    try:
        return [(run_dir / MEMBERS_FILE).read_text(encoding="utf-8")]
    except (OSError, ValueError):
        return []


def find_live_run(texts: Iterable[str], own_secret: str | None = None) -> LiveRun | None:
    """Return the run that a member of these `Contacts`, as JSON, belongs to; None where nobody answers any more.

    Where this process has a secret of its own, contacts with another one are passed over: a stranger may have left
    them.
    """
    members: dict[str, dict[str, Member]] = {}
    for text in texts:
        with suppress(ValidationError):
            contacts = Contacts.model_validate_json(text)
            secret = contacts.secret or own_secret
            if secret is not None and own_secret in (None, secret):
                members.setdefault(secret, {}).update({each.incarnation: each for each in contacts.members})
    for secret, known in members.items():
        answering = _answering([*known.values()])
        for member in answering:
            facts = _fetched(secret, member, FACTS)
            if facts is not None:
                return LiveRun(secret, answering, facts)
    return None


def ask_member(host: str, data_port: int, secret: str) -> LiveRun:
    """Return the run that the member with an exchange at this place belongs to.

    Raises:
        CommunicationError: nobody of that run answers there.
    """
    facts = fetch(Source(host, data_port), run_keys(secret), FACTS, ANSWER_S, most_bytes=MOST_BYTES)
    if facts is None:
        raise CommunicationError(f"{host}:{data_port}: the run there has not begun; try again in a moment")
    try:
        return LiveRun(secret, _AnyFacts.model_validate_json(facts).members, facts)
    except ValidationError:
        raise CommunicationError(f"{host}:{data_port}: the run there is of another version of skippipe") from None


class _AnyFacts(BaseModel):
    """What every version of the facts of a run has."""

    members: tuple[Member, ...]


def _fetched(secret: str, member: Member, name: str) -> bytes | None:
    try:
        return fetch(Source(member.host, member.data_port), run_keys(secret), name, ANSWER_S, most_bytes=MOST_BYTES)
    except SkipPipeError as reason:  # another program may have that port by now
        logger.info("%s: %s", member.name, reason)
        return None


def _answering(members: Sequence[Member]) -> list[Member]:
    def answers(member: Member) -> bool:
        try:
            with socket.create_connection((member.host, member.data_port), _CONNECT_S):
                return True
        except (OSError, ValueError):  # the latter: a name that cannot be one of a host
            return False

    if not members:
        return []
    with ThreadPoolExecutor(min(len(members), _MOST_AT_ONCE)) as pool:
        return [member for member, up in zip(members, pool.map(answers, members), strict=True) if up]
