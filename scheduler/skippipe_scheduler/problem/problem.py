"""A scheduling problem: nodes, what each task and transfer costs, and the rules a plan must obey.

The file format is `skippipe.problem/1`. A problem either fixes the placement (`stages`) or leaves it free
(`stage_sizes`), but for nodes that are `pinned`. All costs are resolved to seconds, so that a problem needs neither a
model nor a cluster.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from skippipe_scheduler.errors import ProblemError
from skippipe_scheduler.files import Count, PositiveCount, PositiveSeconds, Seconds, StrictModel, parse, read_json
from skippipe_scheduler.problem.gradient_reduction import SECONDS, LinkSpeeds
from skippipe_scheduler.problem.pins import check_pins

FORMAT: Final = "skippipe.problem/1"
Contention = Literal["none", "link", "node"]
Reduction = Literal["ring", "tree", "direct"]
RouteLength = Annotated[int, Field(ge=2)]


class Rules(StrictModel):
    """What routes may do: the constraints of the SkipPipe paper, made exact in docs/plan-file.md."""

    num_stages: Annotated[int, Field(ge=2, examples=[6])]
    """Stages of the model."""
    route_length: Annotated[int, Field(ge=2, examples=[4])]
    """How many stages a route visits; of a mix the longest."""
    max_swaps: Count = 1
    """How many stages a route may visit late, that is after a higher one."""
    max_swap_distance: Count = 1
    """How many higher stages may come before a late visit; 0 turns swaps off."""
    max_forward_jump: PositiveCount = 4
    """How many stages past the furthest one visited a route may jump."""
    uniform_coverage: bool = True
    """Whether the stages that routes may leave out are all visited equally often, to within one visit."""
    route_lengths: Annotated[dict[RouteLength, PositiveCount], Field(min_length=1)] | None = Field(
        default=None, examples=[{6: 1, 4: 1, 3: 2}]
    )
    """A mix of lengths: shares of the microbatches by route length. `route_length` is then the longest of them."""
    protected_stages: tuple[Count, ...] = Field(default=(), examples=[[5]])
    """Stages beside 0 that every route visits, ascending."""

    @field_validator("protected_stages")
    @classmethod
    def _sorted_beside_the_first(cls, stages: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(stages) - {0}))

    @model_validator(mode="after")
    def _route_fits(self) -> Self:
        if self.route_length > self.num_stages:
            raise ValueError(f"route_length {self.route_length} is more than the {self.num_stages} stages there are")
        if self.route_lengths and max(self.route_lengths) != self.route_length:
            raise ValueError(
                f"route_length is {self.route_length}, but the longest of route_lengths is {max(self.route_lengths)}"
            )
        if self.protected_stages and self.protected_stages[-1] >= self.num_stages:
            raise ValueError(
                f"protected_stages has stage {self.protected_stages[-1]}, stages are 0 to {self.num_stages - 1}"
            )
        return self

    @property
    def lengths(self) -> tuple[int, ...]:
        """Every length that a route may have, shortest first."""
        return tuple(sorted(self.route_lengths)) if self.route_lengths else (self.route_length,)

    @property
    def shared_stages(self) -> tuple[int, ...]:
        """Stages that a route may leave out."""
        return tuple(stage for stage in range(1, self.num_stages) if stage not in self.protected_stages)

    def describe_lengths(self) -> str:
        """Return the lengths that routes may have, in words: "4", or "6, 4 or 3"."""
        *others, last = [str(length) for length in reversed(self.lengths)]
        return f"{', '.join(others)} or {last}" if others else last

    def length_counts(self, total: int) -> dict[int, int]:
        """Return how many of `total` microbatches have each length: by share, rests to the largest remainders."""
        shares = self.route_lengths or {self.route_length: 1}
        whole = sum(shares.values())
        counts = {length: total * share // whole for length, share in shares.items()}
        largest = sorted(shares, key=lambda length: (-(total * shares[length] % whole), -length))
        for length in largest[: total - sum(counts.values())]:
            counts[length] += 1
        return dict(sorted(counts.items()))

    def coverage(self, total: int) -> tuple[tuple[int, int], ...]:
        """Return by stage the least and the greatest number of `total` microbatches that may visit it.

        All visit stage 0 and those protected; the others share the rest of the visits, to within one where coverage is
        uniform.
        """
        always = 1 + len(self.protected_stages)
        visits = sum(count * (length - always) for length, count in self.length_counts(total).items())
        share, rest = divmod(visits, len(self.shared_stages) or 1)
        bounds = (share, share + (rest > 0)) if self.uniform_coverage else (0, total)
        return tuple(bounds if stage in self.shared_stages else (total, total) for stage in range(self.num_stages))

    def limits(self, total: int) -> dict[int, tuple[int, int]]:
        """Return `coverage` of the stages behind 0 that not just any number of `total` microbatches may visit."""
        bounds = enumerate(self.coverage(total))
        return {stage: bound for stage, bound in bounds if stage and bound != (0, total)}


class Costs(StrictModel):
    """Seconds of every task and transfer.

    With `contention` other than "none", the part of a transfer that occupies the link is `activation_bytes /
    bandwidth`; the rest is latency.
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
        matrices = {"transfer_s": self.transfer_s}
        if self.contention != "none":
            matrices |= {"latency_s": self.latency_s or {}, "gbit_per_s": self.gbit_per_s or {}}
        for name, matrix in matrices.items():
            for source in nodes:
                for destination in nodes:
                    if source != destination and destination not in matrix.get(source, {}):
                        return f"costs.{name} has no entry from {source!r} to {destination!r}"
        return None


class StageNodes(StrictModel):
    """The replicas of one stage where the placement is given."""

    nodes: Annotated[tuple[str, ...], Field(min_length=1, examples=[["iowa-0", "london-0"]])]
    """The nodes that hold the stage."""


class EvenMicrobatches(StrictModel):
    """The origins start equal shares of `even` microbatches, to one where they do not divide."""

    even: PositiveCount = Field(examples=[40])
    """Microbatches of one iteration, over all origins, which start equal shares."""


class AutoMicrobatches(StrictModel):
    """The planner chooses how many of `auto` microbatches each origin starts; it may be none."""

    auto: PositiveCount = Field(examples=[40])
    """Microbatches of one iteration, over all origins, where the planner chooses the shares."""


class Problem(StrictModel):
    """Everything the planner needs to know; a problem needs neither a model nor a cluster."""

    format: Literal["skippipe.problem/1"] = FORMAT
    """What kind of file this is, and of which version."""
    about: str = Field(default="", examples=["18 nodes in 12 regions"])
    """Where the problem comes from, in words."""
    nodes: Annotated[tuple[str, ...], Field(min_length=2, examples=[["iowa-0", "london-0"]])]
    """Names of the nodes, in rank order."""
    regions: tuple[str, ...] | None = Field(default=None, examples=[["Iowa", "London"]])
    """Region of each node, in the order of nodes; for reports."""
    stages: tuple[StageNodes, ...] | None = Field(
        default=None, examples=[[{"nodes": ["iowa-0"]}, {"nodes": ["london-0"]}]]
    )
    """The placement, where it is given: every node once."""
    stage_sizes: tuple[PositiveCount, ...] | None = Field(default=None, examples=[[1, 1]])
    """Replicas of each stage, where the planner chooses the placement."""
    pinned: dict[str, Count] | None = Field(default=None, examples=[{"iowa-0": 0}])
    """Stage of the nodes that must not move, beside stage_sizes; the other nodes are free."""
    stage_layers: tuple[PositiveCount, ...] | None = Field(default=None, examples=[[4, 4]])
    """Layers of each stage; task times scale with them against the mean. Even where not given."""
    microbatches_per_origin: PositiveCount | EvenMicrobatches | AutoMicrobatches = Field(examples=[{"even": 40}])
    """How many microbatches each origin starts in an iteration: a number, or how a total is shared out."""
    stage_bytes: tuple[PositiveCount, ...] | None = Field(default=None, examples=[[200_000_000, 100_000_000]])
    """Gradient bytes of each stage, from which reduce_s follows for any placement (needs latency and bandwidth)."""
    reduction: Reduction = "ring"
    """How the replicas of a stage reduce their stage_bytes (docs/plan-file.md)."""
    costs: Costs
    rules: Rules
    published: dict[str, Any] | None = Field(default=None, examples=[{"iteration_s": 31.2}])
    """What others report for the problem; not used."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        repeated = sorted({node for node in self.nodes if self.nodes.count(node) > 1})
        if repeated:
            raise ValueError(f"node name {repeated[0]!r} is used twice")
        if self.regions is not None and len(self.regions) != len(self.nodes):
            raise ValueError(f"regions has {len(self.regions)} entries for {len(self.nodes)} nodes")
        if (self.stages is None) == (self.stage_sizes is None):
            raise ValueError("give either stages (placement fixed) or stage_sizes (placement free)")
        for name in ("stages", "stage_sizes", "stage_layers", "stage_bytes"):
            entries = getattr(self, name)
            if entries is not None and len(entries) != self.rules.num_stages:
                raise ValueError(f"{name} has {len(entries)} entries but rules.num_stages is {self.rules.num_stages}")
        placed = [node for stage in self.stages or () for node in stage.nodes]
        if self.stages is not None and sorted(placed) != sorted(self.nodes):
            odd = sorted(set(placed) ^ set(self.nodes)) or [n for n in self.nodes if placed.count(n) > 1]
            raise ValueError(f"stages must hold every node exactly once; look at {odd[0]!r}")
        if self.stage_sizes is not None and sum(self.stage_sizes) != len(self.nodes):
            raise ValueError(f"stage_sizes add up to {sum(self.stage_sizes)} but there are {len(self.nodes)} nodes")
        if self.pinned and self.stage_sizes is None:
            raise ValueError("pinned goes with stage_sizes: where stages are given no node is free; leave pinned out")
        check_pins(self.pinned or {}, self.nodes, self.sizes)
        gap = self.costs.missing(self.nodes)
        if gap:
            raise ValueError(gap)
        return self

    @property
    def num_stages(self) -> int:
        """Number of stages of the model."""
        return self.rules.num_stages

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of replicas of each stage."""
        if self.stage_sizes is not None:
            return self.stage_sizes
        return tuple(len(stage.nodes) for stage in self.stages or ())

    @property
    def stage_weight(self) -> tuple[float, ...]:
        """Task time of each stage relative to a stage of mean size."""
        if self.stage_layers is None:
            return (1.0,) * self.num_stages
        mean = sum(self.stage_layers) / self.num_stages
        return tuple(layers / mean for layers in self.stage_layers)

    @property
    def num_microbatches(self) -> int:
        """Microbatches of one iteration over all origins."""
        given = self.microbatches_per_origin
        if isinstance(given, int):
            return given * self.sizes[0]
        return given.auto if isinstance(given, AutoMicrobatches) else given.even

    @property
    def free_origins(self) -> bool:
        """Whether the planner chooses how many microbatches each origin starts."""
        return isinstance(self.microbatches_per_origin, AutoMicrobatches)

    def microbatches_of_origins(self) -> tuple[int, ...]:
        """Return how many microbatches each origin starts: equal, and to one where the total does not divide.

        Where the planner chooses (`free_origins`), this is only where it begins.
        """
        share, rest = divmod(self.num_microbatches, self.sizes[0])
        return tuple(share + (index < rest) for index in range(self.sizes[0]))

    def reduce_s(self, stages: tuple[tuple[str, ...], ...]) -> tuple[float, ...]:
        """Return the gradient reduction time of every stage when `stages` hold these nodes.

        How they follow from bytes and links: `skippipe_scheduler.problem.gradient_reduction`.
        """
        if self.costs.reduce_s is not None:
            return self.costs.reduce_s
        if self.stage_bytes is None or self.costs.latency_s is None or self.costs.gbit_per_s is None:
            return (0.0,) * self.num_stages
        links = LinkSpeeds(self.costs.latency_s, self.costs.gbit_per_s, cards_shared=self.costs.contention == "node")
        return tuple(
            0.0 if len(nodes) == 1 else SECONDS[self.reduction](links, nodes, size_bytes * 8e-9)
            for nodes, size_bytes in zip(stages, self.stage_bytes, strict=True)
        )


def load_problem(path: Path) -> Problem:
    """Read a problem file; raise `ProblemError` naming the first offence."""
    content = read_json(path, ProblemError)
    if content.get("format") != FORMAT:
        raise ProblemError(f"{path}: format is {content.get('format')!r}, expected {FORMAT!r}")
    return parse(Problem, content, str(path), ProblemError)
