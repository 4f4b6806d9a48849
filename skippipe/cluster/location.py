"""Where every rank runs: its machine, its network, its device, its name."""

import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from skippipe.errors import ConfigError
from skippipe.model.device import device_identity


@dataclass(frozen=True)
class RankLocation:
    """One rank's place. `machine`, `network` and `device` are equal exactly where they are shared."""

    host: str
    machine: str
    network: str
    device: str
    given_name: str | None
    given_region: str | None


def own_location(device: torch.device) -> RankLocation:
    """Return the place of this process; SKIPPIPE_NODE and SKIPPIPE_REGION give its name and region."""
    host = platform.node() or "node"
    machine = _read(Path("/proc/sys/kernel/random/boot_id")) or host
    return RankLocation(
        host=host,
        machine=machine,
        network=f"{machine}/{_network_namespace()}",
        device=f"{machine}/{device_identity(device)}",
        given_name=os.environ.get("SKIPPIPE_NODE") or None,
        given_region=os.environ.get("SKIPPIPE_REGION") or None,
    )


def node_names(places: Sequence[RankLocation]) -> list[str]:
    """Return a name for every rank: the one given, else its host's, numbered where several ranks have the same.

    Raises `ConfigError` where two ranks were given the same name.
    """
    hosts = Counter(place.host for place in places if place.given_name is None)
    numbers: Counter[str] = Counter()
    names = []
    for place in places:
        name = place.given_name or place.host
        if place.given_name is None and hosts[place.host] > 1:
            numbers[place.host] += 1
            name = f"{place.host}-{numbers[place.host] - 1}"
        names.append(name)
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        ranks = [str(rank) for rank, name in enumerate(names) if name == repeated[0]]
        raise ConfigError(
            f"ranks {' and '.join(ranks)} are both called {repeated[0]!r}; give each process its own SKIPPIPE_NODE"
        )
    return names


def sharing(places: Sequence[RankLocation], rank: int) -> int:
    """Return how many ranks compute on the device of `rank`, itself included."""
    return sum(place.device == places[rank].device for place in places)


def _network_namespace() -> str:
    """Return what tells apart processes of one machine that have network interfaces of their own."""
    try:
        return str(os.stat("/proc/self/ns/net").st_ino)
    except OSError:
        return ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
