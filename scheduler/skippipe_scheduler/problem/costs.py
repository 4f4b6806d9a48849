"""What every task and every transfer of a problem or a plan costs, in seconds."""

from collections.abc import Mapping
from typing import Self

from pydantic import Field, model_validator

from skippipe_scheduler.files import PositiveCount, PositiveSeconds, Seconds, StrictModel
from skippipe_scheduler.problem.contention import Contention


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
    """What carries one transfer at a time: nothing; every directed link; or with node every network card, too."""
    activation_bytes: PositiveCount | None = Field(default=None, examples=[16_777_216])
    """Bytes of one activation, which follow each other on a link or card that is shared."""
    latency_s: dict[str, dict[str, Seconds]] | None = Field(default=None, examples=[{"iowa-0": {"london-0": 0.0481}}])
    """Seconds from node to node before the first byte arrives."""
    gbit_per_s: dict[str, dict[str, PositiveSeconds]] | None = Field(
        default=None, examples=[{"iowa-0": {"london-0": 0.188}}]
    )
    """Bandwidth from node to node."""

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
        return None
