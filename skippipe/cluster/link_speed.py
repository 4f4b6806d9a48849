"""How long messages take between ranks, over gloo as in training: latency by echoes, bandwidth by long messages.

Ranks that share a network (one host) share its links: one pair of hosts is measured by one pair of ranks. Pairs are
measured in rounds, in each of which a host takes part once, so that measurements do not disturb each other.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from skippipe.cluster.location import RankLocation
from skippipe.runtime.ranks.torch_errors import begun, translating_errors

END, ECHO = -1, 0
REQUEST_TAG, DATA_TAG, REPLY_TAG = 1, 2, 3
ECHO_S = 0.3
LEAST_ECHOES, MOST_ECHOES = 5, 200
FIRST_BYTES, MOST_BYTES = 64 * 2**10, 128 * 2**20
LONG_ENOUGH_S = 0.3
"""A message that takes so long has left TCP's slow start behind on any usual path."""
MOST_REPEATS = 30
MOST_GBIT_PER_S = 1000.0
"""A message that takes no longer than an echo is taken to travel so fast."""


class MeasuredLink(NamedTuple):
    """One direction between two ranks; `call_s` is what starting to send and to receive costs the sender itself."""

    source: int
    destination: int
    latency_s: float
    gbit_per_s: float
    call_s: float


@dataclass
class Peer:
    """The rank at the other end."""

    rank: int
    call_s: list[float] = field(default_factory=list)

    def expect(self, tag: int, size_bytes: int = 8) -> Callable[[], Tensor]:
        """Post a receive; the returned function waits for the message."""
        buffer = torch.empty(size_bytes, dtype=torch.uint8)
        work = self._start(lambda: dist.irecv(buffer, self.rank, tag=tag))

        def wait() -> Tensor:
            translating_errors(self._action, (self.rank,), work.wait)
            return buffer

        return wait

    def send(self, message: Tensor, tag: int) -> None:
        """Send and wait until it has left."""
        translating_errors(
            self._action, (self.rank,), self._start(lambda: dist.isend(message, self.rank, tag=tag)).wait
        )

    def tell(self, number: int, tag: int) -> None:
        """Send a number."""
        self.send(torch.tensor([number]).view(torch.uint8), tag)

    def _start(self, call: Callable[[], dist.Work | None]) -> dist.Work:
        start_s = time.perf_counter()
        work = begun(translating_errors(self._action, (self.rank,), call))
        self.call_s.append(time.perf_counter() - start_s)
        return work

    @property
    def _action(self) -> str:
        return f"measured the link with rank {self.rank}"


def measure_link(own_rank: int, peer: Peer, size_bytes: int | None, limit_s: float) -> MeasuredLink:
    """Measure the direction from here to `peer`, which answers meanwhile (`answer`).

    With `size_bytes` the bandwidth is such that a message of that size takes as long as it did. Without, or where that
    is hardly more than its latency, the bandwidth is that of messages that grow until they take long enough.
    """
    latency_s = statistics.median(_echoes(peer)) / 2
    gbit_per_s = None
    if size_bytes is not None:
        on_wire_s = _fixed(peer, size_bytes, limit_s) - 2 * latency_s  # there and back, and the message on its way
        gbit_per_s = 8e-9 * size_bytes / on_wire_s if on_wire_s > latency_s else None
    if gbit_per_s is None:
        size_bytes, message_s = _growing(peer, limit_s)
        gbit_per_s = 8e-9 * size_bytes / max(message_s - 2 * latency_s, 8e-9 * size_bytes / MOST_GBIT_PER_S)
    peer.tell(END, REQUEST_TAG)
    return MeasuredLink(own_rank, peer.rank, latency_s, gbit_per_s, 2 * statistics.median(peer.call_s))


def answer(peer: Peer) -> None:
    """Reply to `peer` until it has measured its direction."""
    request = peer.expect(REQUEST_TAG)
    while (size_bytes := int(request().view(torch.int64))) != END:
        request = peer.expect(REQUEST_TAG)  # before the reply, as the runtime posts receives ahead
        if size_bytes != ECHO:
            data = peer.expect(DATA_TAG, size_bytes)
            peer.tell(0, REPLY_TAG)
            data()
        peer.tell(0, REPLY_TAG)


def _echoes(peer: Peer) -> list[float]:
    times: list[float] = []
    end_s = time.perf_counter() + ECHO_S
    while len(times) < LEAST_ECHOES or (len(times) < MOST_ECHOES and time.perf_counter() < end_s):
        reply = peer.expect(REPLY_TAG)
        start_s = time.perf_counter()
        peer.tell(ECHO, REQUEST_TAG)
        reply()
        times.append(time.perf_counter() - start_s)
    return times


def _message(peer: Peer, size_bytes: int) -> float:
    """Return the seconds until a message of `size_bytes`, whose receive is posted, has arrived and a reply is here."""
    data = torch.zeros(size_bytes, dtype=torch.uint8)
    ready, done = peer.expect(REPLY_TAG), peer.expect(REPLY_TAG)
    peer.tell(size_bytes, REQUEST_TAG)
    ready()
    start_s = time.perf_counter()
    peer.send(data, DATA_TAG)
    done()
    return time.perf_counter() - start_s


def _fixed(peer: Peer, size_bytes: int, limit_s: float) -> float:
    """Return the median time of a message; the first only warms up, unless it takes all the time."""
    times: list[float] = []
    while sum(times) < limit_s and len(times) < MOST_REPEATS:
        times.append(_message(peer, size_bytes))
    return statistics.median(times[1:] or times)


def _growing(peer: Peer, limit_s: float) -> tuple[int, float]:
    """Return the size and the time of the last of messages that grow."""
    size_bytes = FIRST_BYTES
    end_s = time.perf_counter() + limit_s
    while True:
        message_s = _message(peer, size_bytes)
        if message_s >= LONG_ENOUGH_S or 4 * size_bytes > MOST_BYTES or time.perf_counter() + 4 * message_s > end_s:
            return size_bytes, message_s
        size_bytes *= 4


def representatives(places: Sequence[RankLocation]) -> tuple[list[tuple[int, int]], list[int]]:
    """Return the pairs of ranks that measure inside a network, and one rank of every network."""
    members: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        members.setdefault(place.network, []).append(rank)
    inside = [(ranks[0], ranks[1]) for ranks in members.values() if len(ranks) > 1]
    return inside, [ranks[0] for ranks in members.values()]


def rounds(ranks: Sequence[int], concurrent: int | None = None) -> list[list[tuple[int, int]]]:
    """Return every pair of `ranks` once, in rounds of disjoint pairs, at most `concurrent` in each.

    One rank stays, the others move on by one seat from round to round (the circle method): no round can be spared.
    """
    seats: list[int | None] = [*ranks, *([None] if len(ranks) % 2 else [])]
    found = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        whole = [(pair, other) for pair, other in pairs if pair is not None and other is not None]
        step = concurrent or max(1, len(whole))
        found += [whole[first : first + step] for first in range(0, len(whole), step)]
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def take_part(
    own_rank: int, pairs: Sequence[tuple[int, int]], size_bytes: int | None, limit_s: float
) -> MeasuredLink | None:
    """Measure in one round: the first of a pair, then the second. Return the link from here; None without a pair."""
    for first, second in pairs:
        if own_rank in (first, second):
            peer = Peer(second if own_rank == first else first)
            if own_rank == first:
                link = measure_link(own_rank, peer, size_bytes, limit_s)
                answer(peer)
                return link
            answer(peer)
            return measure_link(own_rank, peer, size_bytes, limit_s)
    return None
