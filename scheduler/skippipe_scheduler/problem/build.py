"""From a cluster and a workload to a scheduling problem with every cost in seconds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from skippipe_scheduler.errors import ProblemError, nearest
from skippipe_scheduler.files import describe
from skippipe_scheduler.problem.cluster import Cluster, Link, Node
from skippipe_scheduler.problem.costs import Costs
from skippipe_scheduler.problem.gradient_reduction import Reduction
from skippipe_scheduler.problem.memory import microbatches_held, per_stage
from skippipe_scheduler.problem.pins import check_pins, open_stages
from skippipe_scheduler.problem.problem import AutoMicrobatches, EvenMicrobatches, Problem, StageNodes
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.problem.stage_sizes import StageSizes, least_sizes, size_choices
from skippipe_scheduler.problem.workload import Workload, route_length, split_layers

StagePlacement = Sequence[Sequence[str]] | Mapping[int, Sequence[str]]
LayersPerStage = tuple[int, ...]
"""Layers of each stage."""
StageSizesChoice = Sequence[int] | Literal["auto"]
"""Replicas of each stage, or that the planner may choose them."""


@dataclass(frozen=True)
class LayerSplitProblem:
    """A problem whose layers of each stage are still open (`skippipe_scheduler.solver.layer_split` chooses them).

    `pose` returns the problem for one choice; it raises `InfeasibleError` where a node cannot hold its stage.
    """

    num_layers: int
    num_stages: int
    pose: Callable[[LayersPerStage], Problem]


def build_problem(
    cluster: Cluster,
    workload: Workload,
    *,
    num_stages: int,
    skip_ratio: float,
    num_microbatches: int,
    layers_per_stage: Sequence[int] | None = None,
    stage_sizes: StageSizesChoice | None = None,
    placement: StagePlacement | None = None,
    pinned: Mapping[str, int] | None = None,
    route_lengths: Mapping[int, int] | None = None,
    free_origins: bool = False,
    max_swaps: int = 1,
    max_swap_distance: int = 1,
    max_forward_jump: int = 4,
    uniform_coverage: bool = True,
    protected_stages: Sequence[int] = (),
    task_overhead_s: float | None = None,
    reduction: Reduction = "ring",
) -> Problem:
    """Return the problem of training a model on a cluster; the placement is free where it is not given.

    Args:
        cluster: The nodes and their links.
        workload: What one microbatch of the model costs.
        num_stages: Into how many stages the model's layers are cut.
        skip_ratio: Share of the stages that each microbatch leaves out.
        num_microbatches: Microbatches of one iteration, over all origins.
        layers_per_stage: Layers of each stage; as even as possible where not given.
        stage_sizes: Replicas of each stage where the placement is free; from the skip ratio where not given. With
            `"auto"` nodes hold as many microbatches as they can under all of `stage_sizes.size_variants`.
        placement: Nodes of each stage, every node once.
        pinned: Stage of single nodes; the others are free.
        route_lengths: A mix of lengths in place of the skip ratio: shares of the microbatches by the number of stages
            that they visit.
        free_origins: Whether the planner chooses how many microbatches each origin starts.
        max_swaps: How many stages a route may visit late, that is after a higher one.
        max_swap_distance: How many higher stages may come before a late visit.
        max_forward_jump: How many stages past the furthest one visited a route may jump.
        uniform_coverage: Whether the stages that routes may leave out are all visited equally often, to within one
            visit.
        protected_stages: Stages that every route visits; stage 0 always is one.
        task_overhead_s: For how many seconds a node is busy after each task; as the cluster says where not given.
        reduction: How the replicas of a stage reduce their gradients: `"ring"`, `"tree"` or `"direct"`.

    Returns:
        The problem, with every cost in seconds.

    Raises:
        ProblemError: Something does not fit together.
        InfeasibleError: There are fewer nodes than stages, or a node cannot hold one microbatch of a stage that it may
            get.

    Examples:
        >>> problem = build_problem(cluster, workload, num_stages=3, skip_ratio=0.33, num_microbatches=6)
        >>> problem.rules.route_length, problem.sizes
        (2, (2, 1, 1))
        >>> build_problem(cluster, workload, num_stages=3, skip_ratio=0.7, num_microbatches=6)
        Traceback (most recent call last):
        skippipe_scheduler.errors.ProblemError: skip_ratio 0.7 leaves 1 of 3 stages, a route needs at least 2; ...
    """
    length = max(route_lengths) if route_lengths else route_length(num_stages, skip_ratio)
    layers = split_layers(workload.num_layers, num_stages, layers_per_stage)
    members = cluster.members()
    names = tuple(node.name for node in members)
    stages = None if placement is None else _checked_placement(placement, num_stages, names)
    if stages is not None:
        _check_beside_placement(stages, stage_sizes, pinned)
    try:
        rules = Rules(
            num_stages=num_stages,
            route_length=length,
            route_lengths=None if route_lengths is None else dict(route_lengths),
            max_swaps=max_swaps,
            max_swap_distance=max_swap_distance,
            max_forward_jump=max_forward_jump,
            uniform_coverage=uniform_coverage,
            protected_stages=tuple(protected_stages),
        )
        choices = _choices_of_sizes(stages, stage_sizes, len(names), rules)
        sizes = choices[0]
        stages_of = _stages_of_nodes(names, stages, sizes, _checked_pins(pinned or {}, names, sizes, num_stages))
        return Problem(
            about=f"cluster {cluster.name}",
            nodes=names,
            regions=tuple(node.region for node in members),
            stages=None if stages is None else tuple(StageNodes(nodes=nodes) for nodes in stages),
            stage_sizes=sizes if stages is None else None,
            pinned=dict(pinned) if pinned else None,
            stage_layers=layers,
            stage_bytes=per_stage(layers, workload.layer_gradient_bytes, workload.embedding_and_head_gradient_bytes),
            reduction=reduction,
            microbatches_per_origin=AutoMicrobatches(auto=num_microbatches)
            if free_origins
            else EvenMicrobatches(even=num_microbatches),
            costs=_costs(cluster, workload, layers, least_sizes(choices), stages_of, num_microbatches, task_overhead_s),
            rules=rules,
        )
    except ValidationError as reason:
        raise ProblemError(f"{reason.title}: {describe(reason)}") from None


def _check_beside_placement(
    stages: Sequence[Sequence[str]], stage_sizes: StageSizesChoice | None, pinned: Mapping[str, int] | None
) -> None:
    if pinned:
        raise ProblemError("placement gives every node its stage; leave pinned out")
    if stage_sizes == "auto":
        raise ProblemError("placement gives every stage its nodes; leave stage_sizes: auto out")
    if stage_sizes is not None and [*stage_sizes] != [len(nodes) for nodes in stages]:
        raise ProblemError(f"stage_sizes {[*stage_sizes]} contradict the placement; leave one of them out")


def _choices_of_sizes(
    stages: Sequence[Sequence[str]] | None, stage_sizes: StageSizesChoice | None, num_nodes: int, rules: Rules
) -> list[StageSizes]:
    """Return the sizes that the stages may get, those to begin with first."""
    if stages is not None:
        return [tuple(len(nodes) for nodes in stages)]
    if stage_sizes is not None and stage_sizes != "auto":
        return [tuple(stage_sizes)]
    choices = size_choices(num_nodes, rules)
    return choices if stage_sizes == "auto" else choices[:1]


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


def _stages_of_nodes(
    names: tuple[str, ...],
    stages: tuple[tuple[str, ...], ...] | None,
    sizes: tuple[int, ...],
    pinned: dict[str, int],
) -> dict[str, list[int]]:
    """Return the stages that each node may get."""
    fixed = pinned | {node: stage for stage, nodes in enumerate(stages or ()) for node in nodes}
    free = sorted(open_stages(pinned, sizes))
    return {name: [fixed[name]] if name in fixed else free for name in names}


def _costs(
    cluster: Cluster,
    workload: Workload,
    layers: tuple[int, ...],
    sizes: Sequence[int],
    stages_of: Mapping[str, Sequence[int]],
    num_microbatches: int,
    task_overhead_s: float | None,
) -> Costs:
    members = cluster.members()
    forward_flop = workload.layer_forward_flop * workload.num_layers / len(layers)
    latency_s: dict[str, dict[str, float]] = {node.name: {} for node in members}
    gbit_per_s: dict[str, dict[str, float]] = {node.name: {} for node in members}
    transfer_s: dict[str, dict[str, float]] = {node.name: {} for node in members}
    for source, destination, link in cluster.resolved_links():
        latency_s[source][destination] = link.latency_ms / 1e3
        gbit_per_s[source][destination] = link.gbit_per_s
        transfer_s[source][destination] = _transfer_s(link, workload.activation_bytes)
    backward_s = {
        node.name: _task_s(node, node.backward_s, forward_flop * workload.backward_to_forward) for node in members
    }
    weight_s = {name: taken_s * workload.weight_share for name, taken_s in backward_s.items()}
    return Costs(
        forward_s={node.name: _task_s(node, node.forward_s, forward_flop) for node in members},
        backward_s=backward_s,
        weight_s=weight_s if workload.weight_share else None,
        loss_s={node.name: _task_s(node, node.loss_s, workload.loss_flop) for node in members},
        task_overhead_s=cluster.task_overhead_s if task_overhead_s is None else task_overhead_s,
        transfer_s=transfer_s,
        memory={
            node.name: min(microbatches_held(node, workload, layers, sizes, stages_of[node.name]), num_microbatches)
            for node in members
        },
        contention=cluster.links.contention,
        activation_bytes=workload.activation_bytes,
        latency_s=latency_s,
        gbit_per_s=gbit_per_s,
    )


def _task_s(node: Node, measured_s: float | None, flop: float) -> float:
    if node.compute_tflop_per_s is not None:
        return flop / (node.compute_tflop_per_s * 1e12)
    return measured_s or 0.0


def _transfer_s(link: Link, size_bytes: int) -> float:
    return link.latency_ms / 1e3 + size_bytes * 8e-9 / link.gbit_per_s
