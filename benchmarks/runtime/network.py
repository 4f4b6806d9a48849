"""A shaped network of namespaces on one machine, made by the scripts of a netlab folder; needs root.

The folder holds `netlab_tun.py` (`up N LINKS`: a relay with a rate and a latency for each directed pair of nodes; lines
of LINKS are `source destination mbit ms`) and `netlab.sh` (`exec I COMMAND`: run a command on node I).
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, permutations
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SCRIPTS = ("netlab_tun.py", "netlab.sh")


@dataclass(frozen=True)
class Wire:
    """One direction of a link as it is shaped."""

    mbit_per_s: float
    latency_ms: float


@dataclass(frozen=True)
class Layout:
    """Nodes in regions, and a wire for every pair of regions, a region with itself included."""

    regions: tuple[str, ...]
    wires: dict[tuple[str, str], Wire]

    def wire(self, source: int, destination: int) -> Wire:
        """Return the wire between two nodes."""
        first, second = sorted((self.regions[source], self.regions[destination]))
        return self.wires[first, second]

    def lines(self) -> str:
        """Return the network as the scripts read it."""
        return "".join(
            f"{source} {destination} {wire.mbit_per_s:g} {wire.latency_ms:g}\n"
            for source, destination in permutations(range(len(self.regions)), 2)
            for wire in (self.wire(source, destination),)
        )

    def examples(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Return two nodes for every kind of link that there is."""
        pairs = {}
        for first, second in combinations_with_replacement(sorted(set(self.regions)), 2):
            ends = [
                pair
                for pair in permutations(range(len(self.regions)), 2)
                if (self.regions[pair[0]], self.regions[pair[1]]) == (first, second)
            ]
            if ends:
                pairs[first, second] = ends[0]
        return pairs

    def cluster_links(self, measured: dict[tuple[str, str], Wire]) -> dict[str, Any]:
        """Return the section `links` of a cluster file."""
        entries = [
            {"regions": [*ends], "latency_ms": wire.latency_ms, "gbit_per_s": wire.mbit_per_s / 1000}
            for ends, wire in measured.items()
        ]
        return {"contention": "link", "between_regions": entries}


FOUR_NODES = Layout(regions=("a",) * 4, wires={("a", "a"): Wire(20, 10)})
SIX_NODES = Layout(
    regions=("a", "a", "b", "b", "c", "c"),
    wires={
        ("a", "a"): Wire(200, 2),
        ("b", "b"): Wire(200, 2),
        ("c", "c"): Wire(200, 2),
        ("a", "b"): Wire(50, 20),
        ("a", "c"): Wire(30, 40),
        ("b", "c"): Wire(20, 60),
    },
)


class Network:
    """The namespaces of a layout while it is entered."""

    def __init__(self, layout: Layout, netlab: Path, folder: Path) -> None:
        self._layout, self._netlab = layout, netlab
        self._links = folder / "links.txt"
        self._relay: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._links.write_text(self._layout.lines())
        relay = [sys.executable, str(self._netlab / SCRIPTS[0]), "up", str(len(self._layout.regions))]
        command = ["setpriv", "--pdeathsig", "TERM", *relay]  # however this process ends, the network goes down
        self._relay = subprocess.Popen([*command, str(self._links)], stdout=subprocess.PIPE, text=True)
        if self._relay.stdout is None or self._relay.stdout.readline() != "up\n":
            self.__exit__(None, None, None)
            raise RuntimeError("the network did not come up; is another one up on this machine?")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._relay is not None and self._relay.poll() is None:
            self._relay.send_signal(signal.SIGTERM)
            self._relay.wait(timeout=30)

    def prefix(self, rank: int) -> Sequence[str]:
        """Return what stands before a command to run it on a node."""
        return ["bash", str(self._netlab / SCRIPTS[1]), "exec", str(rank)]


def why_not(netlab: Path | None) -> str | None:
    """Return why no network can be shaped here, or None."""
    if netlab is None:
        return "needs --netlab FOLDER"
    missing = [name for name in SCRIPTS if not (netlab / name).exists()]
    if missing:
        return f"{netlab} has no {missing[0]}"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    return None
