"""Hosts on one machine that can be cut off: network namespaces on one switch. Needs root and iproute2."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

ADDRESS = "10.78.0.{}"
INTERFACE = "eth0"
NAMED_NAMESPACES = Path("/run/netns")
CLONE_NEWNET = 0x40000000
"""Of setns(2): a network namespace."""


class Hosts:
    """Network namespaces, each with one interface on a switch that is a namespace too, while it is entered.

    A host that is cut off keeps its interface, address and carrier, so that nobody is told: what is sent is just lost.
    """

    def __init__(self, num_hosts: int) -> None:
        self._names = [f"skippipe-{os.getpid()}-{index}" for index in range(num_hosts)]
        self._switch = f"skippipe-{os.getpid()}-switch"

    def __enter__(self) -> Self:
        try:
            self._add(self._switch)
            self._on(self._switch, "link", "add", "bridge", "type", "bridge")
            self._on(self._switch, "link", "set", "bridge", "up")
            for index in range(len(self._names)):
                self._connect(index)
        except subprocess.CalledProcessError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in [*self._names, self._switch]:
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL, check=False)

    def address(self, host: int) -> str:
        """Return the address of a host."""
        return ADDRESS.format(host + 1)

    def prefix(self, host: int) -> Sequence[str]:
        """Return what stands before a command to run it on a host."""
        return ["ip", "netns", "exec", self._names[host], "env", f"GLOO_SOCKET_IFNAME={INTERFACE}"]

    def name(self, host: int) -> str:
        """Return the name of a host, for `move_to`."""
        return self._names[host]

    def heal(self, host: int) -> None:
        """Put the cable of a host into the first switch again."""
        self._on(self._switch, "link", "set", f"port{host}", "master", "bridge")

    def cut(self, host: int) -> None:
        """Take the cable of a host out of the switch."""
        self._on(self._switch, "link", "set", f"port{host}", "nomaster")

    def part(self, hosts: Sequence[int]) -> None:
        """Put the cables of some hosts into another switch: they reach each other, and nobody else."""
        self._on(self._switch, "link", "add", "island", "type", "bridge")
        self._on(self._switch, "link", "set", "island", "up")
        for host in hosts:
            self._on(self._switch, "link", "set", f"port{host}", "master", "island")

    def shape(self, host: int, mbit_per_s: float) -> None:
        """Give the network card of a host so much each way."""
        self._limit(self._names[host], INTERFACE, mbit_per_s)
        self._limit(self._switch, f"port{host}", mbit_per_s)

    def join_parts(self, up_mbit_per_s: float, down_mbit_per_s: float) -> None:
        """Join the hosts that `part` has set apart to the others, by an uplink of so much each way."""
        self._on(self._switch, "link", "add", "siteward", "type", "veth", "peer", "name", "netward")
        self._on(self._switch, "link", "set", "siteward", "master", "island", "up")
        self._on(self._switch, "link", "set", "netward", "master", "bridge", "up")
        self._limit(self._switch, "siteward", up_mbit_per_s)
        self._limit(self._switch, "netward", down_mbit_per_s)

    def _limit(self, name: str, interface: str, mbit_per_s: float) -> None:
        """Let so much leave an interface; one packet at a time, as a large one would pass at once."""
        self._on(name, "link", "set", "dev", interface, "gso_max_segs", "1")
        rate = ["htb", "rate", f"{mbit_per_s}mbit", "burst", "16k", "cburst", "16k", "quantum", "60000"]
        control = ["tc", "-n", name]
        root = ["qdisc", "add", "dev", interface, "root", "handle", "1:", "htb", "default", "1"]
        subprocess.run([*control, *root], check=True)
        subprocess.run(
            [*control, "class", "add", "dev", interface, "parent", "1:", "classid", "1:1", *rate], check=True
        )
        queue = ["qdisc", "add", "dev", interface, "parent", "1:1", "pfifo", "limit", "100"]
        subprocess.run([*control, *queue], check=True)

    def _connect(self, index: int) -> None:
        name = self._names[index]
        self._add(name)
        peer = ["peer", "name", f"port{index}", "netns", self._switch]
        self._on(name, "link", "add", INTERFACE, "type", "veth", *peer)
        self._on(name, "address", "add", f"{self.address(index)}/24", "dev", INTERFACE)
        for interface in (INTERFACE, "lo"):
            self._on(name, "link", "set", interface, "up")
        self._on(self._switch, "link", "set", f"port{index}", "master", "bridge", "up")

    def _add(self, name: str) -> None:
        subprocess.run(["ip", "netns", "add", name], check=True)

    def _on(self, name: str, *command: str) -> None:
        subprocess.run(["ip", "-n", name, *command], check=True)


def move_to(name: str) -> None:
    """Move this process, which should have one thread so far, to a host."""
    with (NAMED_NAMESPACES / name).open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot move to {name}")
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE


def why_not() -> str | None:
    """Return why no hosts can be made here, or None."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    return None if shutil.which("ip") else "needs the command `ip` of iproute2"
