"""Fetching what another process has ready (`exchange`): in pieces, some of them asked for ahead, checked by a hash."""

import hashlib
import json
import sys
import time
from collections import deque
from collections.abc import Callable
from io import BufferedRandom
from typing import Any, NamedTuple, Protocol

import zmq

from skippipe.errors import CommunicationError
from skippipe.membership.keys import RunKeys, zmq_address

PIECE_BYTES = 2**20
"""Of one answer: small beside what a host sends in a second, large beside what a message costs."""
WINDOW = 16
"""Pieces asked for ahead: at 1 Gbit/s they fill a round trip of 100 ms."""
_POLL_S = 0.1
_REPEAT_S = 1.0
"""After so many seconds without an answer the missing pieces are asked for again."""


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
        return Downloads(context, keys).content(source, name, silence_s, wanted, most_bytes)


class Downloads(NamedTuple):
    """What one process fetches from others of its keys."""

    context: "zmq.Context[zmq.Socket[bytes]]"
    keys: RunKeys

    def content(
        self,
        source: Source,
        name: str,
        silence_s: float,
        wanted: Callable[[], bool],
        most_bytes: int = sys.maxsize,
    ) -> bytes | None:
        """Return a content; see `fetch`."""
        memory = _Memory()
        is_here = self._into(memory, source, name, silence_s, wanted, most_bytes) is not None
        return bytes(memory.data) if is_here else None

    def file(
        self, file: BufferedRandom, source: Source, name: str, silence_s: float, wanted: Callable[[], bool]
    ) -> str | None:
        """Write a content to a file that is empty, and return its SHA-256; None where `fetch` returns None."""
        return self._into(_File(file), source, name, silence_s, wanted)

    def _into(
        self,
        target: "_Target",
        source: Source,
        name: str,
        silence_s: float,
        wanted: Callable[[], bool],
        most_bytes: int = sys.maxsize,
    ) -> str | None:
        asking = self.keys.socket(self.context, zmq.DEALER, server=False)
        try:
            asking.connect(zmq_address(source.host, source.port))
            return _Download(asking, source, name, silence_s, most_bytes, target).run(wanted)
        finally:
            asking.close()


class _Target(Protocol):
    """Where a content goes."""

    def begin(self, size_bytes: int) -> None:
        """Make room, in place of what was begun before."""

    def put(self, at: int, piece: bytes) -> None:
        """Take a piece."""

    def sha256(self) -> str:
        """Return the hash of the whole."""


class _Memory:
    """A content that is wanted in memory."""

    def __init__(self) -> None:
        self.data = bytearray()

    def begin(self, size_bytes: int) -> None:
        self.data = bytearray(size_bytes)

    def put(self, at: int, piece: bytes) -> None:
        self.data[at : at + len(piece)] = piece

    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


class _File:
    """A content that is wanted on the disk, and may be larger than the memory."""

    def __init__(self, file: BufferedRandom) -> None:
        self._file = file

    def begin(self, size_bytes: int) -> None:
        self._file.truncate(0)
        self._file.truncate(size_bytes)

    def put(self, at: int, piece: bytes) -> None:
        self._file.seek(at)
        self._file.write(piece)

    def sha256(self) -> str:
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()


class _Download:
    """One content on its way."""

    def __init__(
        self,
        asking: "zmq.Socket[bytes]",
        source: Source,
        name: str,
        silence_s: float,
        most_bytes: int,
        target: _Target,
    ) -> None:
        self._asking, self._most_bytes, self._target = asking, most_bytes, target
        self._source = source
        self._name = name
        self._silence_s = silence_s
        self._sha256 = ""
        self._missing: deque[int] = deque()
        self._under_way: set[int] = set()

    def run(self, wanted: Callable[[], bool]) -> str | None:
        """Ask until all is there, and return its SHA-256; None where there is none, or it is not wanted any more."""
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
                    return self._sha256
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
            self._sha256 = str(answer["sha256"])
            self._target.begin(size)
            self._missing, self._under_way = deque(range(0, max(1, size), PIECE_BYTES)), set()
            if begin in self._missing:
                self._missing.remove(begin)
                self._under_way.add(begin)
        if begin in self._under_way:
            self._under_way.remove(begin)
            self._target.put(begin, piece)
        while self._missing and len(self._under_way) < WINDOW:
            self._under_way.add(self._missing[0])
            self._ask(self._missing.popleft())
        if self._under_way:
            return False
        if self._target.sha256() != self._sha256:
            raise CommunicationError(f"{self._name} from {self._source.host} arrived damaged (SHA-256 differs)")
        return True

    def _ask(self, begin: int) -> None:
        self._asking.send_multipart([json.dumps([self._name, begin]).encode()])
