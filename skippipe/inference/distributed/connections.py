"""Connections between the processes that serve a model: frames of JSON and tensors over TCP.

Training proves the size of every message beforehand and ends when a peer goes, which is what gloo is made for. Here
lengths follow the text, and the others go on without a peer that was lost: so each pair of processes has a connection
of its own that opens at its first frame, carries frames of any length, and fails alone.
"""

import contextlib
import hmac
import json
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from skippipe.runtime.ranks import time_limits

KEEP_ALIVE = {
    "TCP_KEEPIDLE": time_limits.KEEP_ALIVE_IDLE_S,
    "TCP_KEEPINTVL": time_limits.KEEP_ALIVE_INTERVAL_S,
    "TCP_KEEPCNT": time_limits.KEEP_ALIVE_PROBES,
}
"""What the kernel does to notice a machine that is gone."""
HELLO_BYTES = 40


class Endpoint(NamedTuple):
    """Where a process can be reached, and the word that opens."""

    host: str
    port: int
    token: str


class Frame(NamedTuple):
    """One message."""

    header: dict[str, Any]
    tensors: dict[str, Tensor]


class Connections:
    """The connections of one process; what comes in on all of them waits in one queue."""

    def __init__(self, rank: int, host: str, limit_s: float) -> None:
        """`limit_s` bounds how long a connection takes to open, and data that was sent to be received."""
        self._rank, self._host, self._limit_s = rank, host, limit_s
        self._token = secrets.token_hex(16)
        self._server: socket.socket | None = None
        self._doors: Sequence[Endpoint] = ()
        self._inbox: queue.Queue[tuple[int, Frame | None]] = queue.Queue()
        self._peers: dict[int, _Peer] = {}

    def listen(self) -> Endpoint:
        """Let others connect; return what they need to know for that."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        self._server = socket.create_server((self._host, 0), family=family)
        threading.Thread(target=self._accept, args=(self._server,), daemon=True).start()
        return Endpoint(self._host, self._server.getsockname()[1], self._token)

    def know(self, doors: Sequence[Endpoint]) -> None:
        """Learn where the processes are, in rank order."""
        self._doors = doors

    def send(self, rank: int, header: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Send a frame; raise `OSError` where the peer cannot be reached."""
        peer = self._peers.get(rank) or self._connect(rank)
        peer.connection.send_bytes(json.dumps(header).encode())
        peer.connection.send_bytes(save({name: tensor.cpu().contiguous() for name, tensor in (tensors or {}).items()}))

    def receive(self, limit_s: float | None = None) -> tuple[int, Frame | None] | None:
        """Return the next frame and its sender, None for a frame where that one is gone; None if none came in time."""
        with contextlib.suppress(queue.Empty):
            return self._inbox.get(timeout=limit_s)
        return None

    def drop(self, rank: int) -> None:
        """End the connection with one process."""
        peer = self._peers.pop(rank, None)
        if peer is not None:
            peer.end()

    def close(self) -> None:
        """End all connections."""
        if self._server is not None:
            with contextlib.suppress(OSError):
                self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in it
            self._server.close()
        for rank in list(self._peers):
            self.drop(rank)

    def _connect(self, rank: int) -> "_Peer":
        host, port, token = self._doors[rank]
        stream = socket.create_connection((host, port), timeout=self._limit_s)
        stream.sendall(f"{token}{self._rank:08d}".encode())
        return self._add(rank, stream)

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                stream, _ = server.accept()
            except OSError:
                return  # closed
            rank = self._welcome(stream)
            if rank is None:
                stream.close()
            else:
                self._add(rank, stream)

    def _welcome(self, stream: socket.socket) -> int | None:
        """Return the rank of one that knows the token; None for anybody else."""
        deadline_s = time.monotonic() + time_limits.HELLO_S
        hello = b""
        try:
            while len(hello) < HELLO_BYTES:
                stream.settimeout(max(deadline_s - time.monotonic(), 0.001))
                part = stream.recv(HELLO_BYTES - len(hello))
                if not part:
                    return None
                hello += part
        except OSError:
            return None
        token = self._token.encode()
        known = hmac.compare_digest(hello[: len(token)], token)
        return int(hello[len(token) :]) if known and hello[len(token) :].isdigit() else None

    def _add(self, rank: int, stream: socket.socket) -> "_Peer":
        stream.settimeout(None)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in {**KEEP_ALIVE, "TCP_USER_TIMEOUT": int(self._limit_s * 1000)}.items():
            if hasattr(socket, name):  # not on every system
                stream.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        peer = self._peers[rank] = _Peer(stream)
        threading.Thread(target=self._read, args=(rank, peer), daemon=True).start()
        return peer

    def _read(self, rank: int, peer: "_Peer") -> None:
        with contextlib.suppress(EOFError, OSError, ValueError, SafetensorError):
            while True:
                header = json.loads(peer.connection.recv_bytes())
                self._inbox.put((rank, Frame(header, load(peer.connection.recv_bytes()))))
        if self._peers.get(rank) is peer:
            del self._peers[rank]
        self._inbox.put((rank, None))


class _Peer:
    """One open connection."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self.connection: Connection[Any, Any] = Connection(os.dup(stream.fileno()))

    def end(self) -> None:
        """End it for both sides, also for a thread that waits in it."""
        with contextlib.suppress(OSError):
            self._stream.shutdown(socket.SHUT_RDWR)
        self._stream.close()
