"""What a stranger sends to a port of ZeroMQ: garbage, half a greeting, a recorded session, wrong keys, huge frames.

The bytes are those of ZMTP 3 (https://rfc.zeromq.org/spec/23/) and of its CurveZMQ handshake (spec 26).
"""

import asyncio
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

GREETING: Final = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"CURVE".ljust(20, b"\0") + b"\0" + bytes(31)
SHORT_COMMAND, LONG_COMMAND = b"\x04", b"\x06"
HELLO_BYTES: Final = 200
OTHER_PROTOCOLS: Final = (
    b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"SSH-2.0-x\r\n",
)
AT_ONCE = 768
"""Connections that stand at a time to all ports together: less than the descriptors of one process."""
PATIENCE_S = 30.0
"""How long a stranger waits for the other side to close."""
CONNECT_S = 10.0
Attack = Callable[[random.Random], bytes]


def garbage(generator: random.Random) -> bytes:
    """Return bytes that mean nothing, or a question in another protocol."""
    return generator.choice((*OTHER_PROTOCOLS, generator.randbytes(generator.randrange(1, 4096))))


def half_open(generator: random.Random) -> bytes:
    """Return nothing, or the beginning of a greeting."""
    return GREETING[: generator.choice((0, 1, 10, 12, 63, 64))]


def wrong_key(generator: random.Random) -> bytes:
    """Return a handshake's first message that was made with another key than the run's."""
    hello = b"\x05HELLO\x01\x00" + bytes(72)
    return GREETING + SHORT_COMMAND + bytes([HELLO_BYTES]) + hello + generator.randbytes(HELLO_BYTES - len(hello))


def oversized(generator: random.Random) -> bytes:
    """Return the head of a frame of 1 MB to 4 EB, and a part of it."""
    size = 1 << generator.randrange(20, 63)
    return GREETING + LONG_COMMAND + size.to_bytes(8, "big") + generator.randbytes(2**16)


def replayed(sessions: Sequence[bytes], generator: random.Random) -> bytes:
    """Return all that a member has sent in a session, or the first part of it."""
    session: bytes = generator.choice(sessions)
    return session[: generator.randrange(len(GREETING), len(session) + 1)]


def attacks(sessions: Sequence[bytes]) -> Mapping[str, Attack]:
    """Return every kind by name."""
    return {
        "garbage": garbage,
        "half-open": half_open,
        "replayed": partial(replayed, sessions),
        "wrong key": wrong_key,
        "oversized": oversized,
    }


@dataclass
class Outcome:
    """What became of the connections of one kind."""

    ends: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    """How long one stood at most."""
    answer_bytes: int = 0
    """The most that one was told."""


async def strike(ports: Sequence[int], attack: Attack, count: int, generator: random.Random) -> Outcome:
    """Make so many connections to these ports in turn, and wait until the other side has ended each of them."""
    places, outcome = asyncio.Semaphore(AT_ONCE), Outcome()

    async def connect(port: int, content: bytes) -> None:
        async with places:
            begun_s = time.monotonic()
            outcome.ends[await _one(port, content, outcome)] += 1
            outcome.longest_s = max(outcome.longest_s, time.monotonic() - begun_s)

    await asyncio.gather(*(connect(ports[number % len(ports)], attack(generator)) for number in range(count)))
    return outcome


async def _one(port: int, content: bytes, outcome: Outcome) -> str:
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection("127.0.0.1", port), CONNECT_S)
    except (OSError, TimeoutError):
        return "refused"
    try:
        with suppress(OSError):
            writer.write(content)
        told = b""
        try:
            while part := await asyncio.wait_for(reader.read(2**16), PATIENCE_S):
                told += part
        except OSError:
            return "closed"
        except TimeoutError:
            return "left standing"
        finally:
            outcome.answer_bytes = max(outcome.answer_bytes, len(told))
        return "closed"
    finally:
        writer.close()


@contextmanager
def recording(port: int) -> Iterator[tuple[int, bytearray]]:
    """Give a port that leads to another one until it is left, and what its first client sends."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sent = bytearray()
        threading.Thread(target=_pass_on, args=(server, port, sent), daemon=True).start()
        yield server.getsockname()[1], sent


def _pass_on(server: socket.socket, port: int, sent: bytearray) -> None:
    client, _ = server.accept()
    with client, socket.create_connection(("127.0.0.1", port)) as member:
        threading.Thread(target=_copy, args=(member, client, bytearray()), daemon=True).start()
        _copy(client, member, sent)


def _copy(source: socket.socket, target: socket.socket, seen: bytearray) -> None:
    with suppress(OSError):
        while part := source.recv(2**16):
            seen += part
            target.sendall(part)
