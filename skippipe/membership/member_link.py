"""The connection to one member: whether it stands, and what became of the member where it does not."""

import errno
import socket
import time
from typing import NamedTuple

import zmq
from zmq.utils.monitor import recv_monitor_message

from skippipe.errors import CommunicationError
from skippipe.membership.epoch import Member
from skippipe.membership.keys import zmq_address

_GRACE_S = 0.8
"""How long a broken connection may take to be whole again: four round trips."""
_FIRST_GRACE_S = 5.0
"""How long a first one may take."""
_SUSPICION_S = 1.0
"""How long a suspected member is looked at."""


class Loss(NamedTuple):
    """What became of a member: `dead` for certain, or silent, out of reach."""

    dead: bool
    words: str
    detection_s: float
    """From the first sign; a silence began `silence_s` before that."""


class Address(NamedTuple):
    """Where a member is reached, with a numeric host."""

    family: int
    host: str
    port: int


def address_of(member: Member) -> Address:
    """Look a member's host up, once: the library would do it at each attempt, and heartbeats would wait meanwhile.

    Raises:
        CommunicationError: its host has no address.
    """
    try:
        found = socket.getaddrinfo(member.host, member.port, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:  # the latter: a name that cannot be one of a host
        raise CommunicationError(f"{member.host}, the host of {member.name}, has no address ({error})") from error
    return Address(found[0][0], str(found[0][4][0]), member.port)


class MemberLink:
    """A socket that is connected to one member, with a monitor of the connection.

    A break alone says nothing. Where the member's kernel refuses a new connection, the process is dead for certain;
    where it gives no answer, or takes the connection and the process says nothing, it is silent; where the connection
    stands again at once nothing was lost.
    """

    def __init__(self, member: Member, address: Address, dealer: "zmq.Socket[bytes]"):
        self.member = member
        self.dealer = dealer
        self.stands = False
        self._stood = False
        self.loss: Loss | None = None
        self.monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._broken_s: float | None = None
        self._suspected_until_s = 0.0
        self._probe: _Probe | None = None
        self._address = address
        dealer.connect(zmq_address(address.host, address.port))

    @property
    def needs_looks(self) -> bool:
        """Whether `look` has to be called often."""
        if self.loss is not None and self.loss.dead:
            return False
        return self._broken_s is not None or time.monotonic() < self._suspected_until_s

    def expect(self) -> None:
        """From now on the connection has to stand; one that never did is taken for broken."""
        if not self.stands and self._broken_s is None:
            self._broken_s = time.monotonic()

    def suspect(self) -> None:
        """Look closely for a while, because a transfer to the member failed."""
        self._suspected_until_s = time.monotonic() + _SUSPICION_S

    def changes(self) -> bool:
        """Read what the monitor has seen; return whether the connection has come to stand."""
        came = False
        while self.monitor.poll(0):
            event = recv_monitor_message(self.monitor)["event"]
            came = self.stands = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if self.stands:
                self._stood = True
                self._broken_s = None
                self._end_probe()
            elif self._broken_s is None:
                self._broken_s = time.monotonic()
        return came

    def look(self) -> Loss | None:
        """Return what became of the member, where this is new."""
        if not self.needs_looks:
            return None
        self._probe = self._probe or _Probe(self._address)
        answer = self._probe.answer()
        if answer is not None:
            self._probe = None
        begun_s = self._broken_s if self._broken_s is not None else self._suspected_until_s - _SUSPICION_S
        waited_s = time.monotonic() - begun_s
        if answer == errno.ECONNREFUSED:
            self.loss = Loss(True, "connection closed", waited_s)
        elif (
            self.loss is None
            and self._broken_s is not None
            and waited_s > (_GRACE_S if self._stood else _FIRST_GRACE_S)
        ):
            self.loss = Loss(False, "no sign of life", waited_s)
        else:
            return None
        return self.loss

    def forgive(self) -> None:
        """Forget a silence that is over."""
        if self.loss is not None and not self.loss.dead and self.stands:
            self.loss = None

    def close(self, linger_s: float) -> None:
        """Close the connection, with up to `linger_s` for what is still to be sent."""
        self._end_probe()
        self.dealer.disable_monitor()
        self.monitor.close(linger=0)
        self.dealer.close(linger=round(linger_s * 1000))

    def _end_probe(self) -> None:
        if self._probe is not None:
            self._probe.close()
            self._probe = None


class _Probe:
    """One attempt to reach a member's port, that never waits."""

    def __init__(self, address: Address):
        self._address = address
        self._socket = socket.socket(address.family, socket.SOCK_STREAM)
        self._socket.setblocking(False)

    def answer(self) -> int | None:
        """Return 0 for a taken connection, the error's number for another answer, None for none yet."""
        code = self._socket.connect_ex((self._address.host, self._address.port))
        if code in (errno.EINPROGRESS, errno.EALREADY):
            return None
        self.close()
        return code

    def close(self) -> None:
        self._socket.close()
