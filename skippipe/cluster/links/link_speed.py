"""How long messages take between two ranks, over gloo as in training: latency by echoes, bandwidth by long messages."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from skippipe.runtime.ranks.torch_errors import begun, translating_errors

END, ECHO = -1, 0
REQUEST_TAG, DATA_TAG, REPLY_TAG = 1, 2, 3
ECHO_S, SHORT_ECHO_S = 0.3, 0.1
"""For one of few pairs, and for one of many."""
LEAST_ECHOES, MOST_ECHOES = 5, 200
FIRST_BYTES, MOST_BYTES = 64 * 2**10, 128 * 2**20
LONG_ENOUGH_S = 0.3
"""A message that takes so long has left TCP's slow start behind on any usual path."""
MOST_REPEATS = 30
MOST_GBIT_PER_S = 1000.0
"""A message that takes no longer than an echo is taken to travel so fast."""


class MessageTimes(NamedTuple):
    """What messages took in one direction between two ranks.

    `jitter_s` is by how much the latency of an echo differs from that of the one before, on the mean. `gbit_per_s` is
    None where it was not measured. `call_s` is what starting to send and to receive costs the sender itself.
    """

    source: int
    destination: int
    latency_s: float
    jitter_s: float
    gbit_per_s: float | None
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

    def meet(self) -> None:
        """Wait until the other end calls this, too."""
        reply = self.expect(REPLY_TAG)
        self.tell(0, REPLY_TAG)
        reply()

    def _start(self, call: Callable[[], dist.Work | None]) -> dist.Work:
        start_s = time.perf_counter()
        work = begun(translating_errors(self._action, (self.rank,), call))
        self.call_s.append(time.perf_counter() - start_s)
        return work

    @property
    def _action(self) -> str:
        return f"measured the link with rank {self.rank}"


def measure_messages(own_rank: int, peer: Peer, size_bytes: int | None, limit_s: float, far_s: float) -> MessageTimes:
    """Measure the direction from here to `peer`, which answers meanwhile (`answer`).

    With `size_bytes` the bandwidth is such that a message of that size takes as long as it did. Without, or where that
    is hardly more than its latency, the bandwidth is that of messages that grow until they take long enough; where the
    latency is `far_s` or more, none: TCP's slow start would take most of the time.
    """
    latency_s, jitter_s = _latency_and_jitter_s(_echoes(peer))
    gbit_per_s = None
    if size_bytes is not None:
        on_wire_s = _fixed(peer, size_bytes, limit_s) - 2 * latency_s  # there and back, and the message on its way
        gbit_per_s = 8e-9 * size_bytes / on_wire_s if on_wire_s > latency_s else None
    if gbit_per_s is None and latency_s < far_s:
        size_bytes, message_s = _growing(peer, limit_s)
        gbit_per_s = 8e-9 * size_bytes / max(message_s - 2 * latency_s, 8e-9 * size_bytes / MOST_GBIT_PER_S)
    peer.tell(END, REQUEST_TAG)
    return MessageTimes(own_rank, peer.rank, latency_s, jitter_s, gbit_per_s, 2 * statistics.median(peer.call_s))


def measure_echoes(own_rank: int, peer: Peer, first: int) -> MessageTimes | None:
    """Measure the latency alone, where this is the rank that is the `first` of the two; None at the other."""
    peer.meet()
    if own_rank != first:
        answer(peer)
        return None
    latency_s, jitter_s = _latency_and_jitter_s(_echoes(peer, SHORT_ECHO_S))
    peer.tell(END, REQUEST_TAG)
    return MessageTimes(own_rank, peer.rank, latency_s, jitter_s, None, 2 * statistics.median(peer.call_s))


def _latency_and_jitter_s(echoes_s: Sequence[float]) -> tuple[float, float]:
    """Return the lower quartile of latencies, as a busy processor only ever makes an echo late, and their jitter."""
    changes_s = [abs(after_s - before_s) / 2 for before_s, after_s in pairwise(echoes_s)]
    return statistics.quantiles(echoes_s, n=4)[0] / 2, statistics.fmean(changes_s)


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


def _echoes(peer: Peer, limit_s: float = ECHO_S) -> list[float]:
    times: list[float] = []
    end_s = time.perf_counter() + limit_s
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
