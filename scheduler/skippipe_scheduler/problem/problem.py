"""A scheduling problem: nodes, what each task and transfer costs, and the rules a plan must obey.

The file format is `skippipe.problem/1`. A problem either fixes the placement (`stages`) or leaves it free
(`stage_sizes`), but for nodes that are `pinned`. All costs are resolved to seconds, so that a problem needs neither a
model nor a cluster.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from skippipe_scheduler.errors import ProblemError, nearest
from skippipe_scheduler.files import Count, Name, PositiveCount, StrictModel, parse, read_json, write_atomically
from skippipe_scheduler.problem.costs import Costs
from skippipe_scheduler.problem.gradient_reduction import LinkSpeeds, Reduction, reduction_s
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.problem.sharing.contention import shares_cards

FORMAT: Final = "skippipe.problem/1"


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
    """Everything the planner needs to know; a problem needs neither a model nor a cluster.

    `build_problem` makes it from a cluster and a workload, `load_problem` reads it. Times are in seconds, memory in
    microbatches.

    Examples:
        >>> problem.nodes, problem.num_stages, problem.num_microbatches
        (('paris-0', 'paris-1', 'turin-0', 'turin-1'), 3, 6)
        >>> fixed = problem.model_copy(update={"rules": Rules(num_stages=3, route_length=3)})
        >>> fixed.rules.lengths
        (3,)
    """

    format: Literal["skippipe.problem/1"] = FORMAT
    """What kind of file this is, and of which version."""
    about: str = Field(default="", examples=["18 nodes in 12 regions"])
    """Where the problem comes from, in words."""
    nodes: Annotated[tuple[Name, ...], Field(min_length=2, examples=[["iowa-0", "london-0"]])]
    """Names of the nodes, in rank order."""
    regions: tuple[Name, ...] | None = Field(default=None, examples=[["Iowa", "London"]])
    """Region of each node, in the order of nodes; for reports, and for reduction hierarchical."""
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
        if self.reduction == "hierarchical" and self.regions is None:
            raise ValueError(
                "reduction hierarchical goes by region: give regions, one for each node, or another reduction"
            )
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
        if self.rules.absent_stages:
            raise ValueError("rules.absent_stages are those of a plan that lost nodes; leave them out of a problem")
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
    def stage_gbit(self) -> tuple[float, ...]:
        """Gradients of each stage; 0 where the problem gives none."""
        return tuple(size_bytes * 8e-9 for size_bytes in self.stage_bytes or (0,) * self.num_stages)

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
        links = self.reduction_links()
        if links is None:
            return (0.0,) * self.num_stages
        return tuple(
            0.0 if len(nodes) == 1 else reduction_s(self.reduction, links, nodes, gbit)
            for nodes, gbit in zip(stages, self.stage_gbit, strict=True)
        )

    def reduction_links(self) -> LinkSpeeds | None:
        """Return the links that reductions go over; None where their seconds are given, or nothing is reduced."""
        costs = self.costs
        if (
            costs.reduce_s is not None
            or self.stage_bytes is None
            or costs.latency_s is None
            or costs.gbit_per_s is None
        ):
            return None
        region_of = dict(zip(self.nodes, self.regions or (), strict=False))
        return LinkSpeeds(
            costs.latency_s, costs.gbit_per_s, shares_cards(costs.contention), costs.shared_capacities(), region_of
        )


def check_pins(pinned: Mapping[str, int], nodes: Sequence[str], sizes: Sequence[int]) -> None:
    """Raise `ValueError` naming the first pin that `nodes` and stages of these sizes have no place for."""
    for node, stage in pinned.items():
        if node not in nodes:
            raise ValueError(f"pinned: unknown node {node!r}; {nearest(node, [*nodes])}")
        if not 0 <= stage < len(sizes):
            raise ValueError(f"pinned: node {node!r} is at stage {stage}; stages are 0 to {len(sizes) - 1}")
    pins = Counter(pinned.values())
    for stage, count in sorted(pins.items()):
        if count > sizes[stage]:
            others = sum(max(1, pins[other]) for other in range(len(sizes)) if other != stage)
            remedy = " or give other stage_sizes" if count + others <= len(nodes) else ""
            raise ValueError(
                f"pinned: {count} nodes are at stage {stage}, which has room for {sizes[stage]} of {len(nodes)} nodes; "
                f"pin fewer nodes there{remedy}"
            )


def pins_within(pinned: Mapping[str, int], sizes: Sequence[int]) -> dict[str, int]:
    """Return the pins that stages of these sizes have room for: the first ones of each stage."""
    room = list(sizes)
    kept: dict[str, int] = {}
    for node, stage in pinned.items():
        if room[stage]:
            kept[node] = stage
            room[stage] -= 1
    return kept


def open_stages(pinned: Mapping[str, int], sizes: Sequence[int]) -> set[int]:
    """Return the stages that a free node may get: those with room beside their pinned nodes."""
    taken = Counter(pinned.values())
    return {stage for stage, size in enumerate(sizes) if taken[stage] < size}


def load_problem(path: str | Path) -> Problem:
    """Read a problem file.

    Args:
        path: The JSON file.

    Returns:
        The problem.

    Raises:
        ProblemError: The file cannot be read or is wrong; the message names the first offence.

    Examples:
        >>> write_problem(problem, Path("problem.json"))
        >>> load_problem(Path("problem.json")).num_stages
        3
    """
    path = Path(path)
    content = read_json(path, ProblemError)
    if content.get("format") != FORMAT:
        raise ProblemError(f"{path}: format is {content.get('format')!r}, expected {FORMAT!r}")
    return parse(Problem, content, str(path), ProblemError)


def write_problem(problem: Problem, path: str | Path) -> None:
    """Write a problem file.

    Args:
        problem: The problem.
        path: The JSON file to write, whole or not at all.

    Raises:
        SkipPipeError: The file cannot be written.

    Examples:
        >>> write_problem(problem, Path("problem.json"))
        >>> load_problem(Path("problem.json")) == problem
        True
    """
    write_atomically(Path(path), problem.model_dump_json(indent=1, exclude_none=True) + "\n")
