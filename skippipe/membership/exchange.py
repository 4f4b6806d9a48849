"""Contents that one process has ready for others, fetched in pieces over a connection of their own.

They are too large for the members' links, where heartbeats would wait behind them. Whoever holds the run's keys may
fetch; what arrives is checked against the hash that the other side made.
"""

import hashlib
import json
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final, NamedTuple

import zmq

from skippipe.errors import CommunicationError
from skippipe.membership.keys import RunKeys, bind_port, zmq_address

logger = logging.getLogger(__name__)
PORT: Final = "SKIPPIPE_PORT"
"""Environment variable with the port of this process's exchange; any free one where it is not set."""
PIECE_BYTES = 2**20
"""Of one answer: small beside what a host sends in a second, large beside what a message costs."""
WINDOW = 16
"""Pieces asked for ahead: at 1 Gbit/s they fill a round trip of 100 ms."""
_LARGEST_QUESTION_BYTES = 2**16
"""A name and where a piece begins."""
_POLL_S = 0.1
_REPEAT_S = 1.0
"""After so many seconds without an answer the missing pieces are asked for again."""


class _Content(NamedTuple):
    data: memoryview
    sha256: str


class _Order(NamedTuple):
    name: str
    make: Callable[[], bytes | memoryview]


class Exchange:
    """Holds contents by name, and answers whoever asks for them."""

    def __init__(self, keys: RunKeys) -> None:
        """Bind a port, `port`, and answer there from now on: a free one, or that of SKIPPIPE_PORT."""
        self._context, self._keys = zmq.Context(), keys
        self._socket = keys.socket(self._context, zmq.ROUTER, server=True, largest_bytes=_LARGEST_QUESTION_BYTES)
        self.port = bind_port(self._socket, os.environ.get(PORT, "*"))
        self._lock = threading.Lock()
        self._contents: dict[str, _Content] = {}
        self._makers: dict[str, Callable[[], bytes | memoryview]] = {}
        self._making: dict[str, threading.Event] = {}
        self._orders: SimpleQueue[_Order | None] = SimpleQueue()
        self._asked_s: dict[str, float] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._answer_all, name="exchange", daemon=True)
        self._thread.start()
        # One for all: each thread has memory of its own, which the allocator keeps when a state is no longer needed.
        threading.Thread(target=self._make_all, name="exchange-maker", daemon=True).start()

    def offer(self, name: str, data: bytes | memoryview) -> None:
        """Have a content ready under a name, in place of the one before; `data` must not change any more."""
        view = memoryview(data)
        content = _Content(view, hashlib.sha256(view).hexdigest())
        with self._lock:
            self._contents[name] = content

    def offer_made(self, name: str, make: Callable[[], bytes | memoryview]) -> None:
        """Have a content under a name that is made once it is asked for, one after the other in one thread."""
        self.withdraw(name)
        with self._lock:
            self._makers[name] = make

    def withdraw(self, name: str) -> None:
        """Have nothing under a name any more; a content that is being made is finished before."""
        with self._lock:
            self._makers.pop(name, None)
            making = self._making.get(name)
        if making is not None:
            making.wait()
        with self._lock:
            self._contents.pop(name, None)

    def asked_within(self, name: str, duration_s: float) -> bool:
        """Whether somebody has asked for a name, there or not, in the last seconds."""
        with self._lock:
            return time.monotonic() - self._asked_s.get(name, float("-inf")) < duration_s

    def fetch(
        self, source: "Source", name: str, silence_s: float, wanted: Callable[[], bool] = lambda: True
    ) -> bytes | None:
        """Return what another exchange of these keys has under a name; see `fetch`.

        All that this one fetches comes through one thread of its own: each thread has memory that the allocator keeps.
        """
        try:
            return _download(self._context, self._keys, source, name, silence_s, lambda: self._is_open() and wanted())
        except zmq.ZMQError:
            if self._is_open():
                raise
            return None

    def _is_open(self) -> bool:
        return not self._closed.is_set()

    def close(self) -> None:
        """Answer no more, and fetch no more."""
        self._closed.set()
        self._orders.put(None)
        self._thread.join()

    def _answer_all(self) -> None:
        while not self._closed.is_set():
            while self._socket.poll(round(_POLL_S * 1000)) and not self._closed.is_set():
                way_back, *question = self._socket.recv_multipart()
                answer = self._answer(question)
                if answer is not None:
                    # A full queue, as to one that is frozen, must not hold up others: who misses a piece asks again.
                    try:
                        self._socket.send_multipart([way_back, *answer], flags=zmq.DONTWAIT)
                    except zmq.ZMQError:
                        continue
        self._socket.close()
        self._context.term()

    def _answer(self, question: list[bytes]) -> list[bytes | memoryview] | None:
        try:
            name, begin = json.loads(question[0])
        except (ValueError, IndexError, TypeError):
            return None
        if not isinstance(name, str) or not isinstance(begin, int) or begin < 0:
            return None
        with self._lock:
            self._asked_s[name] = time.monotonic()
            if name in self._makers:
                self._making[name] = threading.Event()
                self._orders.put(_Order(name, self._makers.pop(name)))
            making = self._making.get(name)
        if making is not None:
            making.wait(_POLL_S)  # others are answered meanwhile, where it takes longer
        with self._lock:
            content, is_made = self._contents.get(name), name not in self._making
        if content is None:
            return [json.dumps({"begin": begin, "size": None, "is_coming": not is_made}).encode(), b""]
        head = {"begin": begin, "size": len(content.data), "sha256": content.sha256}
        return [json.dumps(head).encode(), content.data[begin : begin + PIECE_BYTES]]

    def _make_all(self) -> None:
        while (order := self._orders.get()) is not None:
            try:
                self.offer(order.name, order.make())
            except Exception:
                logger.exception("%s cannot be given", order.name)
            finally:
                with self._lock:
                    self._making.pop(order.name).set()


class Source(NamedTuple):
    """Where somebody's exchange answers."""

    host: str
    port: int


def fetch(
    source: Source,
    keys: RunKeys,
    name: str,
    silence_s: float,
    wanted: Callable[[], bool] = lambda: True,
    most_bytes: int = sys.maxsize,
) -> bytes | None:
    """Return a content whole and as it was offered, or None where there is none of that name, or it is not `wanted`.

    For a process that has no exchange itself.

    Raises:
        CommunicationError: the other side gives no answer for `silence_s`, or its content has more than `most_bytes`.
    """
    with zmq.Context() as context:
        return _download(context, keys, source, name, silence_s, wanted, most_bytes)


def _download(
    context: "zmq.Context[zmq.Socket[bytes]]",
    keys: RunKeys,
    source: Source,
    name: str,
    silence_s: float,
    wanted: Callable[[], bool],
    most_bytes: int = sys.maxsize,
) -> bytes | None:
    asking = keys.socket(context, zmq.DEALER, server=False, largest_bytes=2 * PIECE_BYTES)
    try:
        asking.connect(zmq_address(source.host, source.port))
        return _Download(asking, source, name, silence_s, most_bytes).run(wanted)
    finally:
        asking.close()


class _Download:
    """One content on its way."""

    def __init__(
        self, asking: "zmq.Socket[bytes]", source: Source, name: str, silence_s: float, most_bytes: int
    ) -> None:
        self._asking, self._most_bytes = asking, most_bytes
        self._source = source
        self._name = name
        self._silence_s = silence_s
        self._sha256 = ""
        self._data = bytearray()
        self._missing: deque[int] = deque()
        self._under_way: set[int] = set()

    def run(self, wanted: Callable[[], bool]) -> bytes | None:
        """Ask until all is there, or it is not wanted any more."""
        self._ask(0)
        heard_s = asked_s = time.monotonic()
        while wanted():
            if self._asking.poll(round(_POLL_S * 1000)):
                head, piece = self._asking.recv_multipart()
                heard_s = asked_s = time.monotonic()
                answer = json.loads(head)
                if answer["size"] is None and not answer["is_coming"]:
                    return None
                if answer["size"] is None:
                    asked_s -= _REPEAT_S - _POLL_S
                elif self._take(answer, piece):
                    return bytes(self._data)
            now_s = time.monotonic()
            if now_s - heard_s > self._silence_s:
                raise CommunicationError(
                    f"{self._source.host}:{self._source.port} gives no answer for {self._silence_s:g} s; see whether "
                    "that process runs, that this host reaches its port, and that both have the same secret"
                )
            if now_s - asked_s > _REPEAT_S:
                asked_s = now_s
                for begin in self._under_way or {0}:
                    self._ask(begin)
        return None

    def _take(self, answer: dict[str, Any], piece: bytes) -> bool:
        """Take a piece; return whether all are there and right."""
        begin, size = int(answer["begin"]), int(answer["size"])
        if size > self._most_bytes:
            raise CommunicationError(
                f"{self._name} from {self._source.host} has {size:,} bytes, at most {self._most_bytes:,} are taken"
            )
        if answer["sha256"] != self._sha256:  # the first answer, or another content has taken its place
            self._sha256, self._data = str(answer["sha256"]), bytearray(size)
            self._missing, self._under_way = deque(range(0, max(1, size), PIECE_BYTES)), set()
            if begin in self._missing:
                self._missing.remove(begin)
                self._under_way.add(begin)
        if begin in self._under_way:
            self._under_way.remove(begin)
            self._data[begin : begin + len(piece)] = piece
        while self._missing and len(self._under_way) < WINDOW:
            self._under_way.add(self._missing[0])
            self._ask(self._missing.popleft())
        if self._under_way:
            return False
        if hashlib.sha256(self._data).hexdigest() != self._sha256:
            raise CommunicationError(f"{self._name} from {self._source.host} arrived damaged (SHA-256 differs)")
        return True

    def _ask(self, begin: int) -> None:
        self._asking.send_multipart([json.dumps([self._name, begin]).encode()])
