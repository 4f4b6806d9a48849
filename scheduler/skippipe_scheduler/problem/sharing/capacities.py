"""What network cards and uplinks carry at once, for contention "shared"."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, model_validator

from skippipe_scheduler.files import Name, StrictModel
from skippipe_scheduler.problem.sharing.contention import Resource

CapacityGbitPerS = Annotated[float, Field(gt=0, examples=[10.0])]


class Duplex(StrictModel):
    """Gbit/s that leave and that come in, each by themselves; a file may give one number for both.

    Examples:
        >>> Duplex.model_validate(10)
        Duplex(up=10.0, down=10.0)
        >>> Duplex(up=0.5, down=2).down
        2.0
    """

    up: CapacityGbitPerS
    """Gbit/s of all that leaves."""
    down: CapacityGbitPerS
    """Gbit/s of all that comes in."""

    @model_validator(mode="before")
    @classmethod
    def _one_number_for_both(cls, given: Any) -> Any:
        if isinstance(given, int | float) and not isinstance(given, bool):
            return {"up": given, "down": given}
        return given


class Uplink(StrictModel):
    """What joins a site to all others: messages between its nodes and other nodes share it.

    Examples:
        >>> Uplink(name="Iowa", nodes=("iowa-0", "iowa-1"), gbit_per_s=Duplex(up=1, down=1)).gbit_per_s.up
        1.0
    """

    name: Name = Field(examples=["Iowa"])
    """Name of the site, such as its region."""
    nodes: Annotated[tuple[str, ...], Field(min_length=1, examples=[["iowa-0", "iowa-1"]])]
    """The nodes behind it."""
    gbit_per_s: Duplex = Field(examples=[{"up": 1.0, "down": 1.0}])
    """How much it carries, out of the site (up) and into it (down)."""


@dataclass(frozen=True)
class SharedCapacities:
    """Gbit/s of each card and uplink, and which of them a message from node to node uses.

    Examples:
        >>> site = Uplink(name="Iowa", nodes=("a", "b"), gbit_per_s=Duplex(up=1, down=2))
        >>> capacities = SharedCapacities.of({"a": Duplex(up=10, down=10)}, [site])
        >>> capacities.used("a", "b"), capacities.used("a", "c")
        ((('out', 'a'),), (('out', 'a'), ('up', 'Iowa')))
        >>> capacities.gbit_per_s["down", "Iowa"]
        2.0
    """

    gbit_per_s: Mapping[Resource, float]
    """A card is ("out" or "in", node), an uplink ("up" or "down", its name)."""
    uplinks_of: Mapping[str, tuple[str, ...]]
    """The uplinks that nodes are behind."""
    _used: dict[tuple[str, str], tuple[Resource, ...]] = field(default_factory=dict, compare=False, repr=False)
    _alike: dict[str, int] = field(default_factory=dict, compare=False, repr=False)
    """The number of each node's kind: nodes of one have equal cards, and are behind the same uplinks."""
    _kinds: dict[tuple[object, ...], int] = field(default_factory=dict, compare=False, repr=False)
    _most: dict[tuple[int, int], float] = field(default_factory=dict, compare=False, repr=False)
    """Gbit/s of what messages use between nodes of two kinds: there may be a million pairs of nodes, and few kinds."""

    @staticmethod
    def of(cards: Mapping[str, Duplex], uplinks: Iterable[Uplink]) -> "SharedCapacities":
        """Return the capacities of these cards, by node, and uplinks."""
        gbit_per_s: dict[Resource, float] = {}
        uplinks_of: dict[str, tuple[str, ...]] = {}
        for node, card in cards.items():
            gbit_per_s["out", node], gbit_per_s["in", node] = card.up, card.down
        for uplink in uplinks:
            gbit_per_s["up", uplink.name] = uplink.gbit_per_s.up
            gbit_per_s["down", uplink.name] = uplink.gbit_per_s.down
            for node in uplink.nodes:
                uplinks_of[node] = (*uplinks_of.get(node, ()), uplink.name)
        return SharedCapacities(gbit_per_s, uplinks_of)

    def used(self, source: str, destination: str) -> tuple[Resource, ...]:
        """Return what a message uses: both cards, and the uplinks that one of its ends only is behind."""
        found = self._used.get((source, destination))
        if found is None:
            leaves, enters = self.uplinks_of.get(source, ()), self.uplinks_of.get(destination, ())
            ends: tuple[Resource, ...] = (("out", source), ("in", destination))
            found = (
                *(card for card in ends if card in self.gbit_per_s),
                *(("up", name) for name in leaves if name not in enters),
                *(("down", name) for name in enters if name not in leaves),
            )
            self._used[source, destination] = found
        return found

    def most_gbit_per_s(self, source: str, destination: str, link_gbit_per_s: float) -> float:
        """Return how fast a message is that shares its link, cards and uplinks with no other."""
        if not self.gbit_per_s:
            return link_gbit_per_s
        kinds = self._kind_of(source), self._kind_of(destination)
        most = self._most.get(kinds)
        if most is None:
            used = self.used(source, destination)
            most = self._most[kinds] = min((self.gbit_per_s[resource] for resource in used), default=math.inf)
        return min(link_gbit_per_s, most)

    def _kind_of(self, node: str) -> int:
        kind = self._alike.get(node)
        if kind is None:
            cards = self.gbit_per_s.get(("out", node)), self.gbit_per_s.get(("in", node))
            kind = self._kinds.setdefault((*cards, self.uplinks_of.get(node, ())), len(self._kinds))
            self._alike[node] = kind
        return kind


NO_CAPACITIES = SharedCapacities({}, {})
"""Nothing is shared."""
