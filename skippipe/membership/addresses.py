"""Addresses of hosts: which one is given, and by which the others reach this host."""

import contextlib
import os
import socket
from typing import NamedTuple, Self

import psutil

from skippipe.errors import CommunicationError


class Place(NamedTuple):
    """An address to listen at, or to join."""

    host: str
    port: int

    @classmethod
    def of(cls, text: str) -> Self | None:
        """Return the address that HOST:PORT names, None where it names none."""
        host, colon, port = text.rpartition(":")
        return cls(host.strip("[]"), int(port)) if colon and host and port.isdecimal() and int(port) < 1 << 16 else None

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def own_address(master: str, port: int) -> str:
    """Return the address of this host by which it reaches `master`, or that of the interface that gloo is given."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    for address in psutil.net_if_addrs().get(interface, []):
        if address.family == socket.AF_INET:
            return str(address.address)
    found = socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM)
    for family, kind, _, _, target in sorted(found, key=lambda entry: entry[0] != socket.AF_INET):
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing, only looks up the way
            return str(probe.getsockname()[0])
    raise CommunicationError(f"there is no way from here to {master}; set GLOO_SOCKET_IFNAME to an interface")


def interface_towards(host: str, port: int) -> str | None:
    """Return the interface by which this host reaches another one, or itself; None where none has that address."""
    own = own_address(host, port)
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.split("%")[0] == own for address in addresses):
            return str(name)
    return "lo" if own.startswith("127.") else None
