"""From a cluster and a workload to a scheduling problem with every cost in seconds."""

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import ValidationError

from skippipe_scheduler.errors import ProblemError
from skippipe_scheduler.files import describe
from skippipe_scheduler.problem.cluster import Cluster, Link, Node
from skippipe_scheduler.problem.costs import Costs
from skippipe_scheduler.problem.gradient_reduction import Reduction
from skippipe_scheduler.problem.memory import microbatches_held, per_stage
from skippipe_scheduler.problem.problem import AutoMicrobatches, EvenMicrobatches, Problem, StageNodes
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.problem.stage_layout import ResolvedLayout, StageLayout
from skippipe_scheduler.problem.workload import LighterWorkloads, Workload, split_layers

LayersPerStage = tuple[int, ...]
"""Layers of each stage."""
ALL_OPEN = StageLayout()
"""Layers as even as possible, sizes by the rule of equal work, placement by the planner."""


@dataclass(frozen=True)
class LayerSplitProblem:
    """A problem whose layers of each stage are still open (`skippipe_scheduler.solver.layer_split` chooses them).

    `with_layers` returns the problem for one choice; it raises `InfeasibleError` where a node cannot hold its stage.

    Examples:
        >>> def with_layers(layers):
        ...     layout = StageLayout(layers_per_stage=layers)
        ...     return build_problem(cluster, workload, skip_rules(3, 0.33), num_microbatches=6, layout=layout)
        >>> open_layers = LayerSplitProblem(workload.num_layers, 3, with_layers)
        >>> sum(open_layers.with_layers((workload.num_layers - 2, 1, 1)).stage_layers) == workload.num_layers
        True
    """

    num_layers: int
    num_stages: int
    with_layers: Callable[[LayersPerStage], Problem]


def build_problem(
    cluster: Cluster,
    workload: Workload,
    rules: Rules,
    *,
    num_microbatches: int,
    layout: StageLayout = ALL_OPEN,
    free_origins: bool = False,
    reduction: Reduction = "ring",
    lighter: LighterWorkloads | None = None,
) -> Problem:
    """Return the problem of training a model on a cluster; what the layout leaves out is open.

    Args:
        cluster: The nodes and their links.
        workload: What one microbatch of the model costs.
        rules: What routes may do.
        num_microbatches: Microbatches of one iteration, over all origins.
        layout: What is given of the stages: layers, replicas, nodes.
        free_origins: Whether the planner chooses how many microbatches each origin starts; else all start equally many.
        reduction: How the replicas of a stage reduce their gradients: `"ring"`, `"tree"` or `"direct"`.
        lighter: What could be done for less memory, for the message where a node has too little; general advice where
            not given.

    Returns:
        The problem, with every cost in seconds.

    Raises:
        ProblemError: Something does not fit together.
        InfeasibleError: There are fewer nodes than stages, or a node cannot hold one microbatch of a stage that it may
            get.

    Examples:
        >>> problem = build_problem(cluster, workload, skip_rules(3, 0.33), num_microbatches=6)
        >>> problem.rules.route_length, problem.sizes
        (2, (2, 1, 1))
    """
    layers = split_layers(workload.num_layers, rules.num_stages, layout.layers_per_stage)
    members = cluster.members()
    nodes = tuple(node.name for node in members)
    resolved = layout.resolve(nodes, rules)
    stages = resolved.stages
    try:
        return Problem(
            about=f"cluster {cluster.name}",
            nodes=nodes,
            regions=tuple(node.region for node in members),
            stages=None if stages is None else tuple(StageNodes(nodes=replicas) for replicas in stages),
            stage_sizes=resolved.sizes if stages is None else None,
            pinned=dict(resolved.pinned) or None,
            stage_layers=layers,
            stage_bytes=per_stage(layers, workload.layer_gradient_bytes, workload.embedding_and_head_gradient_bytes),
            reduction=reduction,
            microbatches_per_origin=AutoMicrobatches(auto=num_microbatches)
            if free_origins
            else EvenMicrobatches(even=num_microbatches),
            costs=_costs(cluster, workload, layers, resolved, num_microbatches, lighter),
            rules=rules,
        )
    except ValidationError as reason:
        raise ProblemError(f"{reason.title}: {describe(reason)}") from None


def _costs(
    cluster: Cluster,
    workload: Workload,
    layers: LayersPerStage,
    layout: ResolvedLayout,
    num_microbatches: int,
    lighter: LighterWorkloads | None,
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
        task_overhead_s=cluster.task_overhead_s,
        transfer_s=transfer_s,
        memory={
            node.name: min(
                microbatches_held(
                    cluster, node, workload, layers, layout.least_sizes, layout.stages_of[node.name], lighter
                ),
                num_microbatches,
            )
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
