"""What shows that a process belongs to the run: a key pair that all members make from the run's secret.

And the sockets that are opened with it.
"""

from functools import lru_cache
from typing import NamedTuple

import zmq
from zmq.utils import z85

from skippipe.errors import ConfigError
from skippipe.membership.shared_secret import derived_key

PART_BYTES = 2**18
"""A message to one who listens goes in parts of at most so many bytes. A stranger announces no larger one, either, so
that half of it takes no more memory: blocks of many MB would leave holes between them, and so grow for ever."""
_ENCRYPTION_BYTES = 64
"""No less than the 33 that CurveZMQ adds to a part."""
_LARGEST_ANSWER_BYTES = 2**21
"""Of one that was asked: a piece of an exchange's content, and its head."""
_MEMBERSHIP = "skippipe.membership/1"
_HANDSHAKE_MS = 10_000
"""A handshake takes three round trips, and its two processes may be busy."""


class RunKeys(NamedTuple):
    """The CURVE key pair of one run, both keys in Z85 (40 bytes).

    All members use the same pair, as server and as client. The public key never leaves them and never crosses the
    network in clear: without it no handshake can begin, so a stranger can neither join nor read. Hence no ZAP handler
    is needed, which would run under Python's lock and hold up reconnections while a process computes.
    """

    public: bytes
    secret: bytes

    def socket(self, context: "zmq.Context[zmq.Socket[bytes]]", kind: int, *, server: bool) -> "zmq.Socket[bytes]":
        """Return a socket that speaks with holders of these keys alone, and sends no more once it is closed.

        Whoever announces a larger part than `parts_of` makes is cut off at once, and a stranger after ten seconds.
        """
        made = context.socket(kind)
        made.setsockopt(zmq.IPV6, 1)
        made.setsockopt(zmq.LINGER, 0)
        made.setsockopt(zmq.MAXMSGSIZE, PART_BYTES + _ENCRYPTION_BYTES if server else _LARGEST_ANSWER_BYTES)
        made.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        made.setsockopt(zmq.CURVE_PUBLICKEY, self.public)
        made.setsockopt(zmq.CURVE_SECRETKEY, self.secret)
        if server:
            made.setsockopt(zmq.CURVE_SERVER, 1)
        else:
            made.setsockopt(zmq.CURVE_SERVERKEY, self.public)
        return made


@lru_cache(maxsize=8)
def run_keys(secret: str) -> RunKeys:
    """Derive the key pair of a run from its secret.

    Raises:
        ConfigError: the secret is too short.
    """
    private = z85.encode(derived_key(secret, _MEMBERSHIP))
    return RunKeys(public=zmq.curve_public(private), secret=private)


def parts_of(content: bytes) -> list[memoryview]:
    """Return a content in parts that a listening socket takes."""
    view = memoryview(content)
    return [view[first : first + PART_BYTES] for first in range(0, max(1, len(view)), PART_BYTES)]


def bind_port(server: "zmq.Socket[bytes]", port: str = "*") -> int:
    """Let a socket listen on all interfaces, at any free port or this one, and return which.

    Raises:
        ConfigError: the port is taken, or is none.
    """
    try:
        server.bind(f"tcp://*:{port}")
    except zmq.ZMQError as reason:
        server.close()
        raise ConfigError(f"port {port} cannot be listened on ({reason}); choose another one") from None
    return int(server.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])


def zmq_address(host: str, port: int) -> str:
    """Return how ZeroMQ wants a place to be written."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
