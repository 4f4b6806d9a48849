"""What TCP connections between two hosts carry: one and several, one way alone and both ways at once.

Both hosts begin each phase together, and end it by their own clocks. In each of them one end or both send as much as
they can. A connection is used in all phases that need it, so that TCP's slow start is paid once.

How much has arrived, the sender's kernel knows from acknowledgements: a receiver would see a burst behind each lost
packet, and a process that others hold up sees everything late. It takes Linux; elsewhere there are no rates.
"""

import secrets
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from skippipe.runtime.ranks.torch_errors import TransferError

SEVERAL = 4
"""Connections at once: as many show whether one is held back by its window or by losses rather than by the line."""
TOKEN_BYTES = 16
NEEDED = ("TCP_INFO", "TCP_NOTSENT_LOWAT")
"""Of the system's sockets; there are no rates without."""
HELLO = struct.Struct(f"!{TOKEN_BYTES}sB")
BEGIN = struct.Struct("!d")
BLOCK_BYTES = 32 * 2**10
"""Bytes of one write, and of what may wait unsent: more would still flow when the next phase has begun."""
CONNECT_S = 20.0
"""Seconds until the other host must have connected."""
HELLO_S = 3.0
"""Seconds that a connection has to say that it belongs."""
START_ROUND_TRIPS, START_S = 8, 0.2
"""Round trips, and at least seconds, in which TCP's slow start reaches a line's rate."""
TURN_ROUND_TRIPS, TURN_S = 3, 0.2
"""The same for connections that are at their rate: until what was sent before has passed the queues."""
LEAST_ROUND_TRIPS = 2
"""For how long a rate is measured, where that is longer than the time that is asked for."""
TCP_INFO_BYTES = 220
LEAST_TRIP_AT, SEGMENTS_AT, DELIVERED_AT, SENT_AT, RESENT_AT, TWICE_AT = 148, 156, 192, 200, 208, 216
"""Where Linux keeps in TCP_INFO (`struct tcp_info` of linux/tcp.h, since 4.19) the shortest round trip in microseconds,
the segments sent, those that have arrived, the bytes sent and sent again, and the segments that arrived twice."""


class Phase(NamedTuple):
    """Who sends in a part of the measurement, on how many connections, and whether these have to start first."""

    first_sends: bool
    second_sends: bool
    several: bool
    starts: bool


PHASES = (
    Phase(True, False, several=False, starts=True),
    Phase(True, True, several=False, starts=True),
    Phase(False, True, several=False, starts=False),
    Phase(True, True, several=True, starts=True),
    Phase(True, False, several=True, starts=False),
    Phase(False, True, several=True, starts=False),
)


class Stream(NamedTuple):
    """What one rank sent to another, in Gbit/s of payload; `both` while as much as could be went the other way.

    `resent` is the share of the bytes that TCP had to send again; most of them were dropped from full queues.
    """

    source: int
    destination: int
    one_gbit_per_s: float
    one_both_gbit_per_s: float
    several_gbit_per_s: float
    several_both_gbit_per_s: float
    resent: float
    round_trip_s: float
    """The shortest that TCP has seen, which is that of a connection's first segments."""

    @property
    def most_of_one_gbit_per_s(self) -> float:
        """What one connection carries alone: no less than both ways, where a busy sender held it up alone."""
        return max(self.one_gbit_per_s, self.one_both_gbit_per_s)

    @property
    def rates(self) -> tuple[float, ...]:
        """All of them, in their order."""
        return self[2:6]


class Counts(NamedTuple):
    """What the kernel has counted at one moment on some connections."""

    at_s: float
    delivered_bytes: float
    sent_bytes: int
    resent_bytes: int
    round_trip_s: float

    @classmethod
    def of(cls, connections: Sequence[socket.socket]) -> "Counts":
        """Ask the kernel."""
        delivered, sent, resent, least_us = 0.0, 0, 0, []
        for connection in connections:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
            segments, arrived, twice = (
                struct.unpack_from("=I", info, place)[0] for place in (SEGMENTS_AT, DELIVERED_AT, TWICE_AT)
            )
            own_sent, own_resent = (struct.unpack_from("=Q", info, place)[0] for place in (SENT_AT, RESENT_AT))
            delivered += (arrived - twice) * own_sent / max(1, segments)  # of segments of mean size
            least_us.append(struct.unpack_from("=I", info, LEAST_TRIP_AT)[0])
            sent += own_sent
            resent += own_resent
        return cls(time.perf_counter(), delivered, sent, resent, 1e-6 * min(least_us))

    def gbit_per_s_since(self, before: "Counts") -> float:
        """Return the rate between two moments."""
        return 8e-9 * (self.delivered_bytes - before.delivered_bytes) / (self.at_s - before.at_s)


class StreamAddress(NamedTuple):
    """Where a host takes connections, and what shows that one belongs."""

    host: str
    port: int
    token: str

    def connect(self) -> list[socket.socket]:
        """Return connections to the host. Raises `OSError`."""
        connections = []
        for index in range(SEVERAL):
            connections.append(socket.create_connection((self.host, self.port), timeout=CONNECT_S))
            connections[-1].sendall(HELLO.pack(bytes.fromhex(self.token), index))
        return connections


@contextmanager
def listening(host: str) -> Iterator["StreamListener | None"]:
    """Listen on a free port of one of this host's addresses; None where its system cannot tell rates."""
    if not all(hasattr(socket, name) for name in NEEDED):
        yield None
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family, backlog=4 * SEVERAL) as listener:
        yield StreamListener(
            listener, StreamAddress(host, int(listener.getsockname()[1]), secrets.token_hex(TOKEN_BYTES))
        )


@dataclass
class StreamListener:
    """Takes connections on the host's own side of its address."""

    listener: socket.socket
    address: StreamAddress

    def accept(self) -> list[socket.socket]:
        """Return the connections of one that knows the token, in its order. Raises `OSError`."""
        found: dict[int, socket.socket] = {}
        end_s = time.monotonic() + CONNECT_S
        while len(found) < SEVERAL:
            self.listener.settimeout(max(0.01, end_s - time.monotonic()))
            connection, _ = self.listener.accept()
            connection.settimeout(HELLO_S)
            hello = b""
            with suppress(OSError):  # of a stranger that goes away, or says nothing
                hello = connection.recv(HELLO.size, socket.MSG_WAITALL)
            if hello[:TOKEN_BYTES] == bytes.fromhex(self.address.token) and len(hello) == HELLO.size:
                connection.settimeout(CONNECT_S)
                found[HELLO.unpack(hello)[1]] = connection
            else:
                connection.close()
        return [found[index] for index in sorted(found)]


@dataclass
class StreamEnd:
    """One end of the connections while they are measured."""

    connections: Sequence[socket.socket]
    is_first: bool
    meet: Callable[[], None]
    round_trip_s: float
    measured_s: float
    _block: bytes = field(default=bytes(BLOCK_BYTES), init=False)
    _buffer: bytearray = field(default_factory=lambda: bytearray(2**20), init=False)

    def rates(self) -> dict[tuple[bool, bool], float]:
        """Go through all phases; return how many Gbit/s went out, by whether on several connections, and both ways."""
        for connection in self.connections:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, BLOCK_BYTES)
        rates = {}
        for phase in PHASES:
            self.meet()
            settled_s = time.perf_counter() + (self._start_s if phase.starts else self._turn_s)
            end_s = settled_s + max(self.measured_s, LEAST_ROUND_TRIPS * self.round_trip_s)
            used = self.connections if phase.several else self.connections[:1]
            sends = phase.first_sends if self.is_first else phase.second_sends
            self._run(used if sends else [], settled_s)
            before = Counts.of(used)
            self._run(used if sends else [], end_s)
            if sends:
                both = phase.first_sends and phase.second_sends
                rates[phase.several, both] = Counts.of(used).gbit_per_s_since(before)
        self.meet()  # before anybody closes a connection
        return rates

    @property
    def _start_s(self) -> float:
        return max(START_S, START_ROUND_TRIPS * self.round_trip_s)

    @property
    def _turn_s(self) -> float:
        return TURN_S + TURN_ROUND_TRIPS * self.round_trip_s

    def _run(self, sending: Sequence[socket.socket], end_s: float) -> None:
        """Send on some connections, and take what comes on all, until a moment."""
        while (now_s := time.perf_counter()) < end_s:
            readable, writable, _ = select.select(self.connections, sending, [], end_s - now_s)
            for connection in writable:
                with suppress(BlockingIOError):
                    connection.send(self._block)
            for connection in readable:
                with suppress(BlockingIOError):
                    if connection.recv_into(self._buffer) == 0:
                        raise ConnectionResetError("the connection was closed")


def measure_streams(
    ends: tuple[int, int],
    connect: Callable[[], Sequence[socket.socket]],
    meet: Callable[[], None],
    is_first: bool,
    round_trip_s: float,
    measured_s: float,
) -> Stream:
    """Return what this end sent to the other one; `ends` are this rank and the other, which does the same.

    `meet` returns once both ends have called it. The round trip is the first end's, which tells the second. Raises
    `TransferError`.
    """
    own, other = ends
    with ExitStack() as stack:
        try:
            connections = [stack.enter_context(connection) for connection in connect()]
            if is_first:
                connections[0].sendall(BEGIN.pack(round_trip_s))
            else:
                (round_trip_s,) = BEGIN.unpack(connections[0].recv(BEGIN.size, socket.MSG_WAITALL))
            rates = StreamEnd(connections, is_first, meet, round_trip_s, measured_s).rates()
            counts = Counts.of(connections)
            for connection in connections:  # what still waits to be sent is of no use to anybody
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except (OSError, struct.error) as reason:
            raise TransferError(f"measured streams with rank {other}", (other,), str(reason)) from None
    return Stream(
        own,
        other,
        one_gbit_per_s=rates[False, False],
        one_both_gbit_per_s=rates[False, True],
        several_gbit_per_s=rates[True, False],
        several_both_gbit_per_s=rates[True, True],
        resent=counts.resent_bytes / max(1, counts.sent_bytes),
        round_trip_s=counts.round_trip_s,
    )
