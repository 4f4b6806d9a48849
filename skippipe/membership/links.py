"""Authenticated and encrypted connections from one member to all others.

Each member binds one ROUTER, and connects one DEALER to each other member. What it has to say goes through the DEALER;
an answer to one that it does not know, or no longer, goes back by the way the message came. Heartbeats are sent and
answered by the library's I/O thread, which needs no lock of Python's: only a cut link or a frozen process or host ends
them. Children that are forked without exec keep connections open after a crash, which then shows as silence.
"""

import contextlib
import os
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import NamedTuple

import zmq
from pydantic import ValidationError

from skippipe.membership.epoch import Member
from skippipe.membership.keys import RunKeys, bind_port, parts_of
from skippipe.membership.member_link import Loss, MemberLink, address_of
from skippipe.membership.messages import Envelope

_LOOK_S = 0.02
_SELDOMEST_HEARTBEAT_MS = 1000
"""Each member sends one to each other so often; more would take processors from training."""
_LAST_WORDS_S = 0.3


class Connected(NamedTuple):
    """The connection to a member stands, or stands again."""

    name: str


class MemberLost(NamedTuple):
    """A member is lost; said once, and once more where one that was silent proves dead."""

    name: str
    loss: Loss


class Received(NamedTuple):
    """A message and the way back to its sender."""

    envelope: Envelope
    way_back: bytes | None


LinkNews = Connected | MemberLost | Received


class Links:
    """The connections of one member. One thread uses them; `wake` may be called from any."""

    def __init__(self, keys: RunKeys, silence_s: float):
        self._keys = keys
        self._silence_ms = round(silence_s * 1000)
        self._links: dict[str, MemberLink] = {}
        self._context = zmq.Context()
        self._router = self._socket(zmq.ROUTER, server=True)
        self.port = bind_port(self._router)
        self._wake_up = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._router, zmq.POLLIN)
        self._poller.register(self._wake_up, zmq.POLLIN)

    def connect(self, member: Member) -> None:
        """Connect to a member, if this is not done.

        Raises:
            CommunicationError: its host has no address.
        """
        known = self._links.get(member.name)
        if known is not None and known.member != member:
            self.drop([member.name])
        if member.name not in self._links:
            address = address_of(member)
            dealer = self._socket(zmq.DEALER, server=False)
            heartbeat_ms = min(_SELDOMEST_HEARTBEAT_MS, self._silence_ms // 4)
            dealer.setsockopt(zmq.HEARTBEAT_IVL, heartbeat_ms)
            dealer.setsockopt(zmq.HEARTBEAT_TIMEOUT, self._silence_ms - heartbeat_ms)
            dealer.setsockopt(zmq.HEARTBEAT_TTL, 2 * self._silence_ms)  # for the other end to tidy up
            self._links[member.name] = link = MemberLink(member, address, dealer)
            self._poller.register(dealer, zmq.POLLIN)
            self._poller.register(link.monitor, zmq.POLLIN)

    def drop(self, names: Iterable[str]) -> None:
        """Close the connections to these members; what is not sent yet is lost."""
        for link in [self._links.pop(name) for name in names]:
            self._poller.unregister(link.dealer)
            self._poller.unregister(link.monitor)
            link.close(0.0)

    def losses(self) -> dict[str, Loss]:
        """Return who is lost; a silence is forgotten where the connection stands again."""
        for link in self._links.values():
            link.forgive()
        return {name: link.loss for name, link in self._links.items() if link.loss is not None}

    @property
    def members(self) -> dict[str, Member]:
        """Whom this one is connected to, or tries to be."""
        return {name: link.member for name, link in self._links.items()}

    def standing(self, name: str) -> bool:
        """Whether the connection to a member stands."""
        return name in self._links and self._links[name].stands

    def suspect(self, name: str) -> None:
        """Look closely at a member, to which a transfer failed."""
        if name in self._links:
            self._links[name].suspect()

    def expect_all(self) -> None:
        """From now on every connection has to stand."""
        for link in self._links.values():
            link.expect()

    def note_dead(self, name: str, words: str) -> Loss | None:
        """Take note that a member is dead or has left, which it said or which another shows; None if that is known."""
        link = self._links.get(name)
        if link is None or (link.loss is not None and link.loss.dead):
            return None
        link.loss = Loss(True, words, 0.0)
        return link.loss

    def send(self, name: str, envelope: Envelope) -> None:
        """Send to a connected member; it may be lost where the connection breaks."""
        if name in self._links:
            self._send(self._links[name].dealer, _written(envelope))

    def reply(self, way_back: bytes | None, envelope: Envelope) -> None:
        """Send the way that a message came."""
        if way_back is not None:
            self._send(self._router, [way_back, *_written(envelope)])

    def wake(self) -> None:
        """End a wait for news."""
        os.eventfd_write(self._wake_up, 1)

    def news(self, limit_s: float) -> Iterator[LinkNews]:
        """Wait for at most `limit_s`, and yield what has happened."""
        if any(link.needs_looks for link in self._links.values()):
            limit_s = min(limit_s, _LOOK_S)
        ready = dict(self._poller.poll(round(limit_s * 1000)))
        if self._wake_up in ready:
            os.eventfd_read(self._wake_up)
        for name, link in list(self._links.items()):
            if link.monitor in ready and link.changes():
                yield Connected(name)
        yield from self._received(ready)
        for name, link in list(self._links.items()):
            loss = link.look()
            if loss is not None:
                yield MemberLost(name, loss)

    def close(self, *, last_words: bool) -> None:
        """Close all connections, at once or with a moment for what is still to be sent."""
        for link in self._links.values():
            link.close(_LAST_WORDS_S if last_words and link.stands else 0.0)
        self._links.clear()
        self._router.close(linger=0)
        self._context.term()
        os.close(self._wake_up)

    def _received(self, ready: Container[object]) -> Iterator[LinkNews]:
        for source in [self._router, *(link.dealer for link in self._links.values())]:
            while source in ready and source.poll(0):
                parts = source.recv_multipart()
                route = parts[:1] if source is self._router else []
                try:
                    envelope = Envelope.model_validate_json(b"".join(parts[len(route) :]))
                except ValidationError:
                    continue  # a member of another version, at most: strangers have no connection
                yield Received(envelope, route[0] if route else None)

    def _socket(self, kind: int, *, server: bool) -> "zmq.Socket[bytes]":
        made = self._keys.socket(self._context, kind, server=server)
        made.setsockopt(zmq.HANDSHAKE_IVL, max(5000, 2 * self._silence_ms))
        made.setsockopt(zmq.CONNECT_TIMEOUT, 2000)
        made.setsockopt(zmq.RECONNECT_IVL, 50)
        return made

    @staticmethod
    def _send(out: "zmq.Socket[bytes]", parts: Sequence[bytes | memoryview]) -> None:
        # A queue may be full, as to one that is frozen; whoever needs an answer asks again.
        with contextlib.suppress(zmq.Again):
            out.send_multipart(parts, flags=zmq.DONTWAIT)


def _written(envelope: Envelope) -> list[memoryview]:
    return parts_of(envelope.model_dump_json().encode())
