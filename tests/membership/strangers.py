"""Who has no keys, and tries all the same."""

import socket
from contextlib import suppress

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
"""Of ZMTP 3.0 (https://rfc.zeromq.org/spec/23/)."""
PATIENCE_S = 5.0
"""Less than a stranger may stand who announces nothing."""


def announce(port: int, size_bytes: int) -> None:
    """Announce a message to who listens; raise `TimeoutError` where it does not close the connection at once."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as stranger:
        stranger.sendall(GREETING + b"\x06" + size_bytes.to_bytes(8, "big"))
        with suppress(ConnectionResetError):
            while stranger.recv(2**16):
                pass
