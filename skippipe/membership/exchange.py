"""Contents that one process has ready for others, fetched in pieces over a connection of their own.

They are too large for the members' links, where heartbeats would wait behind them. Whoever holds the run's keys may
fetch; what arrives is checked against the hash that the other side made.
"""

import hashlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from io import BufferedRandom
from queue import SimpleQueue
from typing import Final, NamedTuple, TypeVar

import zmq

from skippipe.errors import CommunicationError
from skippipe.membership.download import PIECE_BYTES, Downloads, Source
from skippipe.membership.keys import RunKeys, bind_port

logger = logging.getLogger(__name__)
PORT: Final = "SKIPPIPE_PORT"
"""Environment variable with the port of this process's exchange; any free one where it is not set."""
_MAKING_S = 0.1
"""How long an answer waits for a content that is being made; whoever asks then asks again."""
Result = TypeVar("Result")


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
        self._context = zmq.Context()
        self._downloads = Downloads(self._context, keys)
        self._socket = keys.socket(self._context, zmq.ROUTER, server=True)
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

    def asked_after(self, name: str, before: str) -> bool:
        """Whether somebody has asked for a name, there or not, and for the name `before` only earlier or never."""
        with self._lock:
            return self._asked_s.get(name, -math.inf) > self._asked_s.get(before, -math.inf)

    def fetch(
        self, source: Source, name: str, silence_s: float, wanted: Callable[[], bool] = lambda: True
    ) -> bytes | None:
        """Return what another exchange of these keys has under a name; see `skippipe.membership.download.fetch`.

        All that this one fetches comes through one thread of its own: each thread has memory that the allocator keeps.
        """
        return self._while_open(lambda: self._downloads.content(source, name, silence_s, self._and(wanted)))

    def fetch_file(
        self, source: Source, name: str, file: BufferedRandom, silence_s: float, wanted: Callable[[], bool]
    ) -> str | None:
        """Write the same to an empty file, piece by piece; return its SHA-256, or None where `fetch` returns None."""
        return self._while_open(lambda: self._downloads.file(file, source, name, silence_s, self._and(wanted)))

    def _and(self, wanted: Callable[[], bool]) -> Callable[[], bool]:
        return lambda: not self._closed.is_set() and wanted()

    def _while_open(self, action: Callable[[], Result | None]) -> Result | None:
        try:
            return action()
        except zmq.ZMQError as reason:
            if not self._closed.is_set():  # as with too many open files
                raise CommunicationError(f"a question to another process failed: {reason}") from None
            return None

    def close(self) -> None:
        """Answer no more, and fetch no more."""
        self._closed.set()
        self._orders.put(None)
        self._context.term()  # ends all waits, and waits until all sockets are closed
        self._thread.join()

    def _answer_all(self) -> None:
        try:
            while True:
                way_back, *question = self._socket.recv_multipart()
                answer = self._answer(question)
                if answer is not None:
                    # A full queue, as to one that is frozen, must not hold up others: who misses a piece asks again.
                    with suppress(zmq.ZMQError):
                        self._socket.send_multipart([way_back, *answer], flags=zmq.DONTWAIT)
        except zmq.ContextTerminated:
            self._socket.close()

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
            making.wait(_MAKING_S)  # others are answered meanwhile, where it takes longer
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
