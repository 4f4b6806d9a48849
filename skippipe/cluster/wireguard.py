"""WireGuard configurations for the hosts of a cluster: all that leaves a host is encrypted, and strangers stay outside.

The format is that of wg-quick(8). Hosts with an endpoint, where others reach them, are connected with all hosts. Hosts
without one, behind NAT, open the connection themselves and keep it open; what they send each other goes through the
hub, the first host with an endpoint.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import Self

import zmq
from zmq.utils import z85

from skippipe.errors import InputError
from skippipe_scheduler.errors import nearest

DEFAULT_PORT = 51820
"""WireGuard's usual one."""
KEEPALIVE_S = 25
"""Between two signs of life to a host behind NAT: what wg(8) names as a sensible interval."""


@dataclass(frozen=True)
class Endpoint:
    """Where others reach a host over UDP."""

    host: str
    port: int

    @classmethod
    def of(cls, text: str) -> Self:
        """Read HOST or HOST:PORT, an IPv6 address with a port in brackets; raise `InputError` where it is neither."""
        host, colon, port = text.rpartition(":")
        if not colon or (":" in host and not host.startswith("[")):  # no port, or part of an IPv6 address
            host, port = text, str(DEFAULT_PORT)
        host = host.strip("[]")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16 or not _is_plain(host):
            raise InputError(f"--endpoint: {text!r} is not HOST or HOST:PORT, with a port of 1 to 65535")
        return cls(host, int(port))

    def __str__(self) -> str:
        """Write it as WireGuard reads it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class VpnHost:
    """One host: its address in the private network, its key pair in base64, and its endpoint if it has one."""

    name: str
    address: IPv4Address
    private_key: str = field(repr=False)
    public_key: str
    endpoint: Endpoint | None


def vpn_hosts(names: Sequence[str], endpoints: Mapping[str, Endpoint], network: IPv4Network) -> list[VpnHost]:
    """Give each host an address and new keys.

    Raises `InputError` where an endpoint is of no host, no host has one, or the network is too small.
    """
    for name in endpoints:
        if name not in names:
            raise InputError(f"--endpoint: there is no node {name!r}; {nearest(name, [*names])}")
    if not endpoints:
        raise InputError("--endpoint: name at least one node that the others reach: --endpoint NODE=HOST[:PORT]")
    if network.num_addresses - 2 < len(names):
        raise InputError(f"--network: {network} has {network.num_addresses - 2} addresses, {len(names)} are needed")
    return [
        VpnHost(name, address, *_key_pair(), endpoints.get(name))
        for name, address in zip(names, network.hosts(), strict=False)
    ]


def configuration(own: VpnHost, hosts: Sequence[VpnHost], network: IPv4Network) -> str:
    """Return the file of one host; it holds that host's private key."""
    hub = next(host for host in hosts if host.endpoint is not None)
    lines = [
        "[Interface]",
        f"# {own.name}",
        f"Address = {own.address}/{network.prefixlen}",
        f"PrivateKey = {own.private_key}",
    ]
    if own.endpoint is not None:
        lines.append(f"ListenPort = {own.endpoint.port}")
    if own == hub and sum(host.endpoint is None for host in hosts) > 1:
        lines.append("PostUp = sysctl -q -w net.ipv4.ip_forward=1")
    for peer, addresses in _peers(own, hosts, hub):
        lines += ["", "[Peer]", f"# {peer.name}", f"PublicKey = {peer.public_key}"]
        lines.append(f"AllowedIPs = {', '.join(f'{address}/32' for address in addresses)}")
        if peer.endpoint is not None:
            lines.append(f"Endpoint = {peer.endpoint}")
            if own.endpoint is None:
                lines.append(f"PersistentKeepalive = {KEEPALIVE_S}")
    return "\n".join(lines) + "\n"


def _peers(own: VpnHost, hosts: Sequence[VpnHost], hub: VpnHost) -> Iterator[tuple[VpnHost, list[IPv4Address]]]:
    """Yield those to whom a host is connected, each with the addresses that are behind it."""
    hidden = [host.address for host in hosts if host.endpoint is None and host != own]
    for peer in hosts:
        if peer == own or (peer.endpoint is None and own.endpoint is None):
            continue
        through = hidden if peer == hub and own.endpoint is None else []
        yield peer, [peer.address, *through]


def _key_pair() -> tuple[str, str]:
    """Return a new private key and its public key: CurveZMQ's are X25519 keys, as WireGuard's."""
    public, private = zmq.curve_keypair()
    return tuple(base64.b64encode(z85.decode(key)).decode() for key in (private, public))  # type: ignore[return-value]  # two of them


def _is_plain(host: str) -> bool:
    return all(character.isalnum() or character in ".-:" for character in host)
