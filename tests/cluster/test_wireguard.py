"""WireGuard configurations: every host reaches every other, directly or through the hub, with keys of its own."""

import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import zmq
from zmq.utils import z85

from skippipe.cli.vpn_files import write_vpn
from skippipe.cluster.wireguard import Endpoint
from skippipe.errors import InputError

CLUSTER = """
format: skippipe.cluster/1
name: homes
nodes:
  - {name: a, count: 4, region: here, forward_s: 0.1, backward_s: 0.2, loss_s: 0.1, max_in_flight: 8}
links: {within_region: {latency_ms: 20, gbit_per_s: 0.1}}
"""
NAMES = ["a-0", "a-1", "a-2", "a-3"]
NETWORK = "10.87.0.0/24"
UNDERLAY = "10.86"
TOOLS = ("ip", "wg", "wg-quick", "wireguard-go", "ping")


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(CLUSTER)
    return path


def sections(path: Path) -> list[dict[str, str]]:
    """Return the interface and the peers of a file."""
    found: list[dict[str, str]] = []
    for line in path.read_text().splitlines():
        if line.startswith("["):
            found.append({"kind": line})
        elif " = " in line:
            key, _, value = line.partition(" = ")
            found[-1][key] = value
    return found


def public_key(private_key: str) -> str:
    import base64

    public = zmq.curve_public(z85.encode(base64.b64decode(private_key)))
    return base64.b64encode(z85.decode(public)).decode()


@pytest.mark.parametrize("with_endpoint", [["a-0"], ["a-2"], ["a-1", "a-3"], NAMES])
def test_every_host_reaches_every_other(cluster: Path, tmp_path: Path, with_endpoint: list[str]) -> None:
    endpoints = [f"{name}={name}.example" for name in with_endpoint]
    hosts = write_vpn(cluster, tmp_path / "vpn", endpoints, [], NETWORK)
    files = {host.name: sections(tmp_path / "vpn" / f"{host.name}.conf") for host in hosts}
    name_of = {public_key(interface["PrivateKey"]): name for name, (interface, *_) in files.items()}
    assert sorted(name_of.values()) == NAMES
    assert {key: host.name for host in hosts for key in [host.public_key]} == name_of

    def next_to(name: str, address: str) -> str:
        return next(name_of[peer["PublicKey"]] for peer in files[name][1:] if f"{address}/32" in peer["AllowedIPs"])

    for host in hosts:
        for other in hosts:
            if host == other:
                continue
            first = next_to(host.name, str(other.address))
            assert first == other.name or (first in with_endpoint and next_to(first, str(other.address)) == other.name)
            if first != other.name:
                assert "ip_forward=1" in files[first][0]["PostUp"]
    for name, (_, *peers) in files.items():
        assert all(("Endpoint" in peer) == (name_of[peer["PublicKey"]] in with_endpoint) for peer in peers)
        assert all(("PersistentKeepalive" in peer) == (name not in with_endpoint) for peer in peers)


def test_files_are_private_and_keys_in_use_stay(cluster: Path, tmp_path: Path) -> None:
    target = tmp_path / "vpn"
    hosts = write_vpn(cluster, target, ["a-0=203.0.113.5:4000"], ["a-0", "a-2"], NETWORK)
    assert [(host.name, str(host.address)) for host in hosts] == [("a-0", "10.87.0.1"), ("a-2", "10.87.0.2")]
    assert not any(host.private_key in repr(host) for host in hosts)
    assert {path.name for path in target.iterdir()} == {"a-0.conf", "a-2.conf"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in target.iterdir()} == {0o600}
    assert sections(target / "a-0.conf")[0]["ListenPort"] == "4000"
    with pytest.raises(InputError, match="exists and is not empty"):
        write_vpn(cluster, target, ["a-0=203.0.113.5"], [], NETWORK)


@pytest.mark.parametrize(
    ("endpoints", "nodes", "network", "words"),
    [
        ([], [], NETWORK, "at least one node"),
        (["a-9=host"], [], NETWORK, "no node 'a-9'; "),
        (["a-1=host"], ["a-0"], NETWORK, "no node 'a-1'"),
        (["a-0"], [], NETWORK, "not NODE=HOST"),
        (["a-0=host", "a-0=other"], [], NETWORK, "a-0=other: a-0 has one already"),
        (["a-0=host:0"], [], NETWORK, "a port of 1 to 65535"),
        (["a-0=host\nPostUp = rm"], [], NETWORK, "not HOST or HOST:PORT"),
        (["a-0=host"], ["b"], NETWORK, "has no node 'b'"),
        (["a-0=host"], [], "10.87.0.0/30", "has 2 addresses, 4 are needed"),
        (["a-0=host"], [], "10.87.0.1/24", "--network"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_written(
    cluster: Path, tmp_path: Path, endpoints: list[str], nodes: list[str], network: str, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        write_vpn(cluster, tmp_path / "vpn", endpoints, nodes, network)
    assert not (tmp_path / "vpn").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("host", "host:51820"), ("host:7", "host:7"), ("[2001:db8::1]:7", "[2001:db8::1]:7"), ("::1", "[::1]:51820")],
)
def test_endpoints_are_written_as_wireguard_reads_them(text: str, expected: str) -> None:
    assert str(Endpoint.of(text)) == expected


class Hosts:
    """Three hosts in network namespaces, of which the last two reach the first one alone."""

    def __init__(self, folder: Path) -> None:
        self.names = [f"skippipe-vpn-{os.getpid()}-{index}" for index in range(3)]
        self._folder = folder

    def open(self) -> None:
        for name in self.names:
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        for index in (1, 2):
            one, other = f"v{os.getpid()}-{index}a", f"v{os.getpid()}-{index}b"
            _run("ip", "link", "add", one, "type", "veth", "peer", "name", other)
            for link, name, end in ((one, self.names[0], 1), (other, self.names[index], 2)):
                _run("ip", "link", "set", link, "netns", name)
                _run("ip", "-n", name, "addr", "add", f"{UNDERLAY}.{index}.{end}/24", "dev", link)
                _run("ip", "-n", name, "link", "set", link, "up")
        _run("ip", "-n", self.names[2], "route", "add", f"{UNDERLAY}.1.1", "via", f"{UNDERLAY}.2.1")

    def up(self, index: int, configuration: Path) -> None:
        """Bring the private network up; sockets of the user-space implementation are the host's own."""
        own = self._folder / str(index) / "skippipe.conf"
        own.parent.mkdir()
        shutil.copy(configuration, own)
        script = 'mkdir -p /var/run/wireguard && mount -t tmpfs none /var/run/wireguard && wg-quick up "$0"'
        _run("ip", "netns", "exec", self.names[index], "sh", "-c", script, str(own))

    def reaches(self, index: int, address: str, limit_s: float) -> bool:
        deadline_s = time.monotonic() + limit_s
        command = ["ip", "netns", "exec", self.names[index], "ping", "-c", "1", "-W", "1", address]
        while subprocess.run(command, capture_output=True, check=False).returncode:
            if time.monotonic() > deadline_s:
                return False
        return True

    def close(self) -> None:
        for name in self.names:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for process in found.stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(process), 9)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stdout, done.stderr)


@pytest.fixture
def three_hosts(tmp_path: Path) -> Iterator[Hosts]:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing or os.geteuid() != 0 or not Path("/dev/net/tun").exists():
        pytest.skip(f"needs root, /dev/net/tun and {', '.join(missing or TOOLS)}")
    hosts = Hosts(tmp_path)
    try:
        hosts.open()
        yield hosts
    finally:
        hosts.close()


@pytest.mark.slow
@pytest.mark.extended
def test_real_hosts_behind_nat_reach_each_other(cluster: Path, tmp_path: Path, three_hosts: Hosts) -> None:
    chosen = NAMES[:3]
    assert not three_hosts.reaches(1, f"{UNDERLAY}.2.2", 0.0)
    hosts = write_vpn(cluster, tmp_path / "vpn", [f"a-0={UNDERLAY}.1.1"], chosen, NETWORK)
    for index, name in enumerate(chosen):
        three_hosts.up(index, tmp_path / "vpn" / f"{name}.conf")
    for index in range(3):
        for host in hosts:
            assert three_hosts.reaches(index, str(host.address), 20.0), (index, host.name)
