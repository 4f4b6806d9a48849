"""The plan: placement, routes, order and predicted times, as a file (`skippipe.plan/1`).

A plan is an artefact: solved once, stored with the run, identified by its hash. `load_plan` proves it (see
`validate.py`) before anyone uses it.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, Self

from pydantic import Field

from skippipe_scheduler.errors import PlanError
from skippipe_scheduler.files import Count, Name, Seconds, StrictModel, parse, read_json, write_atomically
from skippipe_scheduler.problem.costs import Costs
from skippipe_scheduler.problem.rules import Rules

FORMAT: Final = "skippipe.plan/1"
Operation = Literal["F", "L", "B", "W", "RF", "RB"]


class Task(NamedTuple):
    """One entry of a node's order: F forward, L loss at the origin, B backward, RF and RB the two of a relay.

    Where the order has a W of the microbatch, its backward is split there: B is the input gradient, which the node
    before it on the route waits for, and W the weight gradient. A relay computes nothing: RF passes the activation on,
    RB the gradient.
    """

    operation: Operation
    microbatch: int


def split_backwards(tasks: Iterable[tuple[str, int]]) -> frozenset[int]:
    """Return the microbatches whose backward is split among one node's (operation, microbatch)."""
    return frozenset(microbatch for operation, microbatch in tasks if operation == "W")


class PlanStage(StrictModel):
    """Layers [first, last) and the nodes that hold them."""

    layers: tuple[Count, Count] = Field(examples=[[0, 4]])
    """The stage's first layer, and the one after its last."""
    nodes: Annotated[tuple[str, ...], Field(examples=[["iowa-0", "london-0"]])]
    """The nodes that hold the stage; none if rules.absent_stages name it."""


class Route(StrictModel):
    """The nodes that one microbatch visits, origin first."""

    id: Count = Field(examples=[0])
    """Number of the microbatch: 0, 1, 2, ... without gaps."""
    route: Annotated[tuple[str, ...], Field(min_length=2, examples=[["iowa-0", "oregon-1", "london-0"]])]
    """The nodes, in the order of the forward; the loss is at the first, and the backward goes the same way back."""
    path: tuple[str, ...] | None = Field(
        default=None, min_length=2, examples=[["iowa-0", "iowa-1", "oregon-1", "london-0"]]
    )
    """The nodes of the route and, behind any of them, those that only relay its messages; the route where not given."""

    @property
    def whole_path(self) -> tuple[str, ...]:
        """All nodes by way of which the microbatch goes, origin first."""
        return self.path or self.route

    @property
    def relays(self) -> frozenset[str]:
        """The nodes that pass its messages on and compute nothing."""
        return frozenset(self.whole_path) - frozenset(self.route)


class Predicted(StrictModel):
    """Times of one iteration that follow from the rest of the plan alone."""

    iteration_s: Seconds = Field(examples=[8.15])
    """Seconds of the whole iteration."""
    pipeline_s: Seconds = Field(examples=[7.9])
    """Seconds until the last task has ended: the makespan."""
    reduce_exposed_s: Seconds = Field(examples=[0.25])
    """Seconds of gradient reduction after that, which no task hides."""
    lower_bound_s: Seconds = Field(examples=[7.4])
    """No plan of the same problem is shorter than this; where no node relays in this one, none without relays."""


class Solver(StrictModel):
    """How the plan came about."""

    name: str = Field(examples=["skippipe_scheduler"])
    """The program that made the plan."""
    version: str = Field(examples=["0.2.0"])
    """Its version."""
    seed: int = Field(examples=[0])
    """Seed of its search."""
    time_limit_s: Seconds = Field(examples=[60.0])
    """Seconds that it was given."""
    wall_s: Seconds = Field(examples=[58.2])
    """Seconds that it took; 0 where its budget was a number of steps."""


class Plan(StrictModel):
    """Placement, routes, order and predicted times of one iteration; solved once, identified by its hash.

    Nodes go by name, stages and microbatches by number from 0, times are in seconds. The page on the plan file lists
    the rules that a plan obeys.

    Examples:
        >>> plan.layers_per_stage, plan.visits
        ((8, 8, 8), (6, 3, 3))
        >>> plan.stage_of[plan.microbatches[0].route[0]]  # every route begins at an origin
        0
        >>> plan.predicted.lower_bound_s <= plan.predicted.iteration_s
        True
        >>> plan.save(Path("plan.json"))
        >>> load_plan(Path("plan.json")).hash == plan.hash
        True
    """

    format: Literal["skippipe.plan/1"] = FORMAT
    """What kind of file this is, and of which version."""
    nodes: tuple[Name, ...] = Field(examples=[["iowa-0", "london-0"]])
    """Names of the nodes, in rank order."""
    regions: tuple[Name, ...] | None = Field(default=None, examples=[["Iowa", "London"]])
    """Region of each node, in the order of nodes; for reports."""
    stages: tuple[PlanStage, ...]
    """The placement: every layer once, every node once."""
    microbatches: tuple[Route, ...]
    """The routes, one for each microbatch of an iteration."""
    order: dict[str, tuple[Task, ...]] = Field(examples=[{"iowa-0": [["F", 0], ["F", 1], ["L", 0], ["B", 0]]}])
    """What each node runs, in sequence: F forward, L loss at the origin, B backward, W weight gradient of a split
    backward, RF and RB forward and backward of a relay, each with its microbatch."""
    costs: Costs
    rules: Rules
    predicted: Predicted
    solver: Solver

    @cached_property
    def stage_of(self) -> dict[str, int]:
        """Stage that each node holds."""
        return {node: index for index, stage in enumerate(self.stages) for node in stage.nodes}

    @property
    def present_stages(self) -> tuple[int, ...]:
        """Stages that a node holds: all but those that `rules.absent_stages` name."""
        return tuple(index for index, stage in enumerate(self.stages) if stage.nodes)

    @cached_property
    def rank_of(self) -> dict[str, int]:
        """Rank of each node."""
        return {node: rank for rank, node in enumerate(self.nodes)}

    @cached_property
    def layers_per_stage(self) -> tuple[int, ...]:
        """Layers of each stage."""
        return tuple(stage.layers[1] - stage.layers[0] for stage in self.stages)

    @cached_property
    def num_layers(self) -> int:
        """Layers of the model that the plan was made for."""
        return max(stage.layers[1] for stage in self.stages)

    @cached_property
    def split_of(self) -> dict[str, frozenset[int]]:
        """Microbatches whose backward is split on each node."""
        return {node: split_backwards(self.order.get(node, ())) for node in self.nodes}

    @property
    def has_relays(self) -> bool:
        """Whether nodes relay messages of any microbatch."""
        return any(microbatch.relays for microbatch in self.microbatches)

    @cached_property
    def visits(self) -> tuple[int, ...]:
        """How many microbatches visit each stage in one iteration."""
        counts = [0] * len(self.stages)
        for microbatch in self.microbatches:
            for node in microbatch.route:
                counts[self.stage_of[node]] += 1
        return tuple(counts)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a changed copy; what was derived from the old content is derived anew."""
        copied = super().model_copy(update=update, deep=deep)
        for name, attribute in vars(Plan).items():
            if isinstance(attribute, cached_property):
                copied.__dict__.pop(name, None)
        return copied

    def to_json(self) -> str:
        """Return the plan file's text (one canonical form, so that the hash is stable)."""
        content = self.model_dump(mode="json", exclude_none=True)
        return json.dumps(content, separators=(",", ":")) + "\n"

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical text, 16 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write the plan file, whole or not at all; raise `SkipPipeError` where it cannot be written."""
        write_atomically(Path(path), self.to_json())


def parse_plan(path: Path) -> Plan:
    """Read a plan file without proving it; use `validate.load_plan` unless you are the validator."""
    content = read_json(path, PlanError)
    if content.get("format") != FORMAT:
        raise PlanError(f"{path}: format is {content.get('format')!r}, expected {FORMAT!r}")
    return parse(Plan, content, str(path), PlanError)
