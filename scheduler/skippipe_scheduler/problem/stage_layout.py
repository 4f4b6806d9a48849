"""How layers and nodes divide over the stages, as far as that is given: checked, and what it leaves open."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from skippipe_scheduler.errors import ProblemError, nearest
from skippipe_scheduler.problem.problem import check_pins, open_stages
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.problem.stage_sizes import StageSizes, even_sizes, least_sizes, size_choices, with_room_for_pins

StagePlacement = Sequence[Sequence[str]] | Mapping[int, Sequence[str]]
StageSizesChoice = Sequence[int] | Literal["auto", "even"]
"""Replicas of each stage, or that the planner may choose them, or only among even ones."""


@dataclass(frozen=True)
class StageLayout:
    """What is given of the stages; what is left out follows from a rule or is the planner's choice.

    Layers are as even as possible where `layers_per_stage` is left out. `stage_sizes` are the replicas of each stage:
    by default so many that all nodes have the same work; with "auto" nodes hold as many microbatches as they can under
    all of `stage_sizes.size_variants`. `placement` names the nodes of each stage and leaves nothing open; `pinned`
    gives some nodes their stage while the others are free.

    Examples:
        >>> layout = StageLayout(stage_sizes=(2, 1, 1))
        >>> build_problem(cluster, workload, skip_rules(3, 0.33), num_microbatches=6, layout=layout).sizes
        (2, 1, 1)
    """

    layers_per_stage: Sequence[int] | None = None
    stage_sizes: StageSizesChoice | None = None
    placement: StagePlacement | None = None
    pinned: Mapping[str, int] | None = None

    def resolve(self, nodes: tuple[str, ...], rules: Rules) -> "ResolvedLayout":
        """Return the layout of these nodes; raise `ProblemError` where it does not fit them or itself."""
        stages = None if self.placement is None else _checked_placement(self.placement, rules.num_stages, nodes)
        if stages is not None:
            self._check_beside_placement(stages)
        choices = self._size_choices(stages, len(nodes), rules)
        pinned = _checked_pins(self.pinned or {}, nodes, choices[0], rules.num_stages)
        fixed = pinned | {node: stage for stage, replicas in enumerate(stages or ()) for node in replicas}
        free = sorted(open_stages(pinned, choices[0]))
        return ResolvedLayout(
            stages=stages,
            sizes=choices[0],
            pinned=pinned,
            least_sizes=least_sizes(choices),
            stages_of={node: [fixed[node]] if node in fixed else free for node in nodes},
        )

    def _check_beside_placement(self, stages: Sequence[Sequence[str]]) -> None:
        if self.pinned:
            raise ProblemError("placement gives every node its stage; leave pinned out")
        if isinstance(self.stage_sizes, str):
            raise ProblemError(f"placement gives every stage its nodes; leave stage_sizes: {self.stage_sizes} out")
        if self.stage_sizes is not None and [*self.stage_sizes] != [len(nodes) for nodes in stages]:
            raise ProblemError(f"stage_sizes {[*self.stage_sizes]} contradict the placement; leave one of them out")

    def _size_choices(self, stages: Sequence[Sequence[str]] | None, num_nodes: int, rules: Rules) -> list[StageSizes]:
        """Return the sizes that the stages may get, those to begin with first."""
        if stages is not None:
            return [tuple(len(nodes) for nodes in stages)]
        if self.stage_sizes is not None and not isinstance(self.stage_sizes, str):
            return [tuple(self.stage_sizes)]
        if self.stage_sizes == "even":
            first = even_sizes(num_nodes, rules.num_stages)
            choices = [first, first[::-1]]
        else:
            choices = size_choices(num_nodes, rules)[: None if self.stage_sizes == "auto" else 1]
        return list(dict.fromkeys(with_room_for_pins(sizes, self.pinned or {}) for sizes in choices))


@dataclass(frozen=True)
class ResolvedLayout:
    """A layout of given nodes, checked."""

    stages: tuple[tuple[str, ...], ...] | None
    """The nodes of each stage where the placement is given."""
    sizes: StageSizes
    """The replicas of each stage, to begin with where the planner may choose them."""
    pinned: Mapping[str, int]
    least_sizes: StageSizes
    """The fewest replicas that each stage may get: with few of them each holds more of what they share out."""
    stages_of: Mapping[str, Sequence[int]]
    """The stages that each node may get."""


def _checked_placement(
    placement: StagePlacement, num_stages: int, names: tuple[str, ...]
) -> tuple[tuple[str, ...], ...]:
    if isinstance(placement, Mapping):
        if sorted(placement) != list(range(num_stages)):
            raise ProblemError(f"placement has stages {sorted(placement)}, expected 0 to {num_stages - 1}")
        placement = [placement[stage] for stage in range(num_stages)]
    if len(placement) != num_stages:
        raise ProblemError(f"placement has {len(placement)} stages, num_stages is {num_stages}")
    stage_of: dict[str, int] = {}
    for stage, nodes in enumerate(placement):
        if not nodes:
            raise ProblemError(f"placement: stage {stage} has no node; give it at least one")
        for node in nodes:
            if node not in names:
                raise ProblemError(f"placement: stage {stage} has unknown node {node!r}; {nearest(node, [*names])}")
            if node in stage_of:
                raise ProblemError(f"placement: node {node!r} is in stage {stage_of[node]} and again in stage {stage}")
            stage_of[node] = stage
    idle = [name for name in names if name not in stage_of]
    if idle:
        raise ProblemError(f"placement: node {idle[0]!r} of the cluster has no stage; add it or leave it out of both")
    return tuple(tuple(nodes) for nodes in placement)


def _checked_pins(
    pinned: Mapping[str, int], names: tuple[str, ...], sizes: tuple[int, ...], num_stages: int
) -> dict[str, int]:
    if len(sizes) != num_stages:
        raise ProblemError(f"stage_sizes has {len(sizes)} entries for {num_stages} stages")
    try:
        check_pins(pinned, names, sizes)
    except ValueError as reason:
        raise ProblemError(str(reason)) from None
    return dict(pinned)
