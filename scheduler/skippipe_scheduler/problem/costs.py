"""What every task and every transfer of a problem or a plan costs, in seconds."""

from collections.abc import Mapping
from typing import Self

from pydantic import Field, model_validator

from skippipe_scheduler.errors import nearest
from skippipe_scheduler.files import PositiveCount, PositiveSeconds, Seconds, StrictModel
from skippipe_scheduler.problem.sharing.capacities import Duplex, SharedCapacities, Uplink
from skippipe_scheduler.problem.sharing.contention import Contention


class Costs(StrictModel):
    """Seconds of every task and transfer.

    With `contention` other than "none", the part of a transfer that occupies the link is `activation_bytes /
    bandwidth`; the rest is latency.

    Examples:
        >>> costs = problem.costs
        >>> costs.forward_s["turin-0"] > costs.forward_s["paris-0"]
        True
        >>> round(costs.transfer_s["paris-0"]["turin-0"], 3)  # 12 ms, and 8 MiB at 0.5 Gbit/s
        0.146
    """

    forward_s: dict[str, PositiveSeconds] = Field(examples=[{"iowa-0": 0.08, "london-0": 0.1}])
    """Seconds of one forward on each node."""
    backward_s: dict[str, PositiveSeconds] = Field(examples=[{"iowa-0": 0.16, "london-0": 0.2}])
    """Seconds of one whole backward on each node."""
    loss_s: dict[str, Seconds] = Field(examples=[{"iowa-0": 0.02, "london-0": 0.03}])
    """Seconds of one loss on each node that may be an origin."""
    weight_s: dict[str, PositiveSeconds] | None = Field(default=None, examples=[{"iowa-0": 0.07}])
    """The part of backward_s that weight gradients take, on nodes that can run them as a task of their own."""
    task_overhead_s: Seconds = Field(default=0.0, examples=[0.002])
    """For how long a node is busy after each task."""
    transfer_s: dict[str, dict[str, Seconds]] = Field(examples=[{"iowa-0": {"london-0": 0.7}}])
    """Seconds from node to node of one activation, or of its gradient, alone on the link."""
    memory: dict[str, PositiveCount] = Field(examples=[{"iowa-0": 8, "london-0": 6}])
    """How many microbatches each node can hold between their forward and their backward on it."""
    reduce_s: tuple[Seconds, ...] | None = Field(default=None, examples=[[0.5, 0.4]])
    """Seconds of the gradient reduction over the replicas of each stage."""
    contention: Contention = "none"
    """What carries one transfer at a time: nothing; every directed link; or with node every network card, too.
    With shared it is every link, and all links share cards and uplinks fairly."""
    activation_bytes: PositiveCount | None = Field(default=None, examples=[16_777_216])
    """Bytes of one activation, which follow each other on a link or card that is shared."""
    latency_s: dict[str, dict[str, Seconds]] | None = Field(default=None, examples=[{"iowa-0": {"london-0": 0.0481}}])
    """Seconds from node to node before the first byte arrives."""
    gbit_per_s: dict[str, dict[str, PositiveSeconds]] | None = Field(
        default=None, examples=[{"iowa-0": {"london-0": 0.188}}]
    )
    """Bandwidth from node to node; with contention shared at most that of cards and uplinks on the way."""
    card_gbit_per_s: dict[str, Duplex] | None = Field(default=None, examples=[{"iowa-0": {"up": 10.0, "down": 10.0}}])
    """What the network card of a node carries, each way, for contention shared; any amount where not given."""
    uplinks: tuple[Uplink, ...] | None = Field(
        default=None,
        examples=[[{"name": "Iowa", "nodes": ["iowa-0", "iowa-1"], "gbit_per_s": {"up": 1.0, "down": 1.0}}]],
    )
    """What joins the sites to each other, for contention shared."""

    @model_validator(mode="after")
    def _contention_is_resolved(self) -> Self:
        if self.contention != "none" and (
            self.activation_bytes is None or self.latency_s is None or self.gbit_per_s is None
        ):
            raise ValueError(
                f'contention "{self.contention}" needs activation_bytes, latency_s and gbit_per_s beside transfer_s'
            )
        return self

    @model_validator(mode="after")
    def _capacities_are_kept(self) -> Self:
        if self.contention != "shared":
            given = [name for name in ("card_gbit_per_s", "uplinks") if getattr(self, name) is not None]
            if given:
                raise ValueError(f'{given[0]} counts with contention "shared" only, which is "{self.contention}"')
            return self
        names = [uplink.name for uplink in self.uplinks or ()]
        if len(set(names)) < len(names):
            raise ValueError(f"uplinks: the name {max(names, key=names.count)!r} is used twice")
        capacities = self.shared_capacities()
        for source, row in (self.gbit_per_s or {}).items():
            for destination, gbit_per_s in row.items():
                most = capacities.most_gbit_per_s(source, destination, gbit_per_s)
                if most < gbit_per_s:
                    raise ValueError(
                        f"gbit_per_s from {source!r} to {destination!r} is {gbit_per_s:g}, but a card or uplink on the "
                        f"way carries {most:g}; give that, and the transfer_s that follows"
                    )
        return self

    @model_validator(mode="after")
    def _weight_gradient_is_a_part(self) -> Self:
        for node, weight_s in (self.weight_s or {}).items():
            if node in self.backward_s and weight_s >= self.backward_s[node]:
                raise ValueError(
                    f"weight_s of node {node!r} is {weight_s:g} s; it is a part of backward_s, "
                    f"{self.backward_s[node]:g} s, and must be less"
                )
        return self

    def occupancy_s(self, source: str, destination: str) -> float:
        """Seconds for which one activation occupies the link (0 where links are not shared)."""
        if self.contention == "none" or self.activation_bytes is None or self.gbit_per_s is None:
            return 0.0
        return self.activation_bytes * 8e-9 / self.gbit_per_s[source][destination]

    def shared_capacities(self) -> SharedCapacities:
        """Return what cards and uplinks carry, which transfers share with contention "shared"."""
        return SharedCapacities.of(self.card_gbit_per_s or {}, self.uplinks or ())

    def missing(self, nodes: tuple[str, ...]) -> str | None:
        """Return the first cost that `nodes` need and that is not given, in words, or None."""
        for name in ("forward_s", "backward_s", "loss_s", "memory"):
            table: Mapping[str, float] = getattr(self, name)
            for node in nodes:
                if node not in table:
                    return f"costs.{name} has no entry for node {node!r}"
        for name in ("transfer_s", "latency_s", "gbit_per_s"):
            matrix: Mapping[str, Mapping[str, float]] | None = getattr(self, name)
            if matrix is None:
                continue
            for source in nodes:
                for destination in nodes:
                    if source != destination and destination not in matrix.get(source, {}):
                        return f"costs.{name} has no entry from {source!r} to {destination!r}"
        return self._unknown_capacity(nodes)

    def _unknown_capacity(self, nodes: tuple[str, ...]) -> str | None:
        known = set(nodes)
        for node in self.card_gbit_per_s or {}:
            if node not in known:
                return f"costs.card_gbit_per_s: unknown node {node!r}; {nearest(node, nodes)}"
        for uplink in self.uplinks or ():
            for node in uplink.nodes:
                if node not in known:
                    return f"costs.uplinks: unknown node {node!r} behind {uplink.name!r}; {nearest(node, nodes)}"
        return None
