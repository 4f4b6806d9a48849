"""Hosts on one machine that are joined by shaped lines: network namespaces, and a relay between them.

The kernel's own shaper has latencies only with the module netem, which many kernels lack. Needs root, iproute2 and
/dev/net/tun.
"""

import fcntl
import json
import os
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from types import TracebackType
from typing import Self

from common.hosts import INTERFACE, why_not as why_no_hosts

TUN = Path("/dev/net/tun")
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
ADDRESS = (10, 0, 0)
"""Of the network, in which the first host is 10.0.0.1, as on the pages of docs/."""
QUEUE_S = 0.1
"""A packet that would wait for longer is dropped, as home routers do."""


@dataclass(frozen=True)
class Wire:
    """One direction between two hosts; `loss` is a share of the packets, and `None` any rate."""

    mbit_per_s: float | None
    latency_ms: float
    jitter_ms: float = 0.0
    loss: float = 0.0


@dataclass(frozen=True)
class Line:
    """What joins a host to all others, each way; any amount where None."""

    up_mbit_per_s: float | None = None
    down_mbit_per_s: float | None = None


class JoinedHosts:
    """Namespaces with a wire for each ordered pair, while it is entered."""

    def __init__(
        self,
        num_hosts: int,
        wires: Mapping[tuple[int, int], Wire],
        lines: Sequence[Line] = (),
        *,
        mtu_bytes: int = 1500,
    ) -> None:
        self._names = [f"skippipe-{os.getpid()}-line-{index}" for index in range(num_hosts)]
        self._wires, self._lines = wires, lines or [Line()] * num_hosts
        self._mtu_bytes = mtu_bytes
        self._relay: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        devices: list[int] = []
        try:
            for index in range(len(self._names)):
                devices.append(self._connect(index))
            relay = [sys.executable, str(Path(__file__).with_name("relay.py")), json.dumps(self._job(devices))]
            self._relay = subprocess.Popen(relay, stdin=subprocess.PIPE, pass_fds=devices)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        finally:
            for device in devices:
                os.close(device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._relay is not None:
            self._relay.communicate(timeout=30)
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL, check=False)

    def address(self, host: int) -> str:
        """Return the address of a host."""
        return ".".join(map(str, self._bytes(host)))

    def prefix(self, host: int) -> Sequence[str]:
        """Return what stands before a command to run it on a host."""
        return ["ip", "netns", "exec", self._names[host], "env", f"GLOO_SOCKET_IFNAME={INTERFACE}"]

    def cut(self, host: int) -> None:
        """Let nothing leave or reach a host: what others send there is lost, and nobody is told."""
        self._switch(host, "down")

    def heal(self, host: int) -> None:
        """Undo `cut`."""
        self._switch(host, "up")

    def _switch(self, host: int, state: str) -> None:
        subprocess.run(["ip", "-n", self._names[host], "link", "set", INTERFACE, state], check=True)

    def _connect(self, index: int) -> int:
        """Make a host; return the descriptor of its network device, from which what it sends is read."""
        name, created = self._names[index], f"line{os.getpid()}-{index}"
        device = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", created.encode(), IFF_TUN | IFF_NO_PI))
        run = ["ip", "-n", name]
        commands = [
            ["ip", "netns", "add", name],
            ["ip", "link", "set", created, "netns", name, "name", INTERFACE],
            [*run, "link", "set", INTERFACE, "mtu", str(self._mtu_bytes), "up"],
            [*run, "link", "set", "lo", "up"],
            [*run, "address", "add", f"{self.address(index)}/24", "dev", INTERFACE],
        ]
        for command in commands:
            subprocess.run(command, check=True)
        return device

    def _job(self, devices: Sequence[int]) -> dict[str, object]:
        paths = []
        for source, destination in permutations(range(len(self._names)), 2):
            wire = self._wires[source, destination]
            ends = [*self._bytes(source), *self._bytes(destination)]
            paths.append({"source": source, "destination": destination, "ends": ends, **wire.__dict__})
        lines = [{"up": line.up_mbit_per_s, "down": line.down_mbit_per_s} for line in self._lines]
        return {"devices": list(devices), "queue_s": QUEUE_S, "lines": lines, "paths": paths}

    @staticmethod
    def _bytes(host: int) -> tuple[int, ...]:
        return (*ADDRESS, host + 1)


def why_not() -> str | None:
    """Return why no such hosts can be made here, or None."""
    return why_no_hosts() or (None if TUN.exists() else f"needs {TUN}")
