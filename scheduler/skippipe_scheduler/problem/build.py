"""From a cluster and a workload to a scheduling problem with every cost in seconds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from pydantic import ValidationError

from skippipe_scheduler.errors import ProblemError
from skippipe_scheduler.files import describe_made
from skippipe_scheduler.problem.cluster import Cluster, Link, MeasuredFor, Node
from skippipe_scheduler.problem.costs import Costs
from skippipe_scheduler.problem.gradient_reduction import Reduction
from skippipe_scheduler.problem.memory import microbatches_held, per_stage
from skippipe_scheduler.problem.problem import AutoMicrobatches, EvenMicrobatches, Problem, StageNodes
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.problem.stage_layout import ResolvedLayout, StageLayout
from skippipe_scheduler.problem.workload import LighterWorkloads, Workload, split_layers

LayersPerStage = tuple[int, ...]
"""Layers of each stage."""
SAME_FLOP = 0.01
"""Chosen: times are not measured more exactly than to this share, and files round."""
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
        reduction: How the replicas of a stage reduce their gradients, one of `Reduction`.
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
        raise ProblemError(describe_made(reason)) from None


def _costs(
    cluster: Cluster,
    workload: Workload,
    layers: LayersPerStage,
    layout: ResolvedLayout,
    num_microbatches: int,
    lighter: LighterWorkloads | None,
) -> Costs:
    members = cluster.members()
    tasks = stage_flop(workload, len(layers))
    factors = time_factors(cluster.measured_for, tasks)
    latency_s: dict[str, dict[str, float]] = {node.name: {} for node in members}
    gbit_per_s: dict[str, dict[str, float]] = {node.name: {} for node in members}
    transfer_s: dict[str, dict[str, float]] = {node.name: {} for node in members}
    for source, destination, link in cluster.resolved_links():
        latency_s[source][destination] = link.latency_ms / 1e3
        gbit_per_s[source][destination] = link.gbit_per_s
        transfer_s[source][destination] = _transfer_s(link, workload.activation_bytes)
    backward_s = {node.name: _task_s(node, node.backward_s, tasks.backward, factors.backward) for node in members}
    weight_s = {name: taken_s * workload.weight_share for name, taken_s in backward_s.items()}
    return Costs(
        forward_s={node.name: _task_s(node, node.forward_s, tasks.forward, factors.forward) for node in members},
        backward_s=backward_s,
        weight_s=weight_s if workload.weight_share else None,
        loss_s={node.name: _task_s(node, node.loss_s, tasks.loss, factors.loss) for node in members},
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
        card_gbit_per_s=cluster.cards() or None,
        uplinks=cluster.uplinks() or None,
    )


class OfTasks(NamedTuple):
    """One number for each kind of task: FLOP, or by what times are multiplied."""

    forward: float
    backward: float
    loss: float


def stage_flop(workload: Workload, num_stages: int) -> OfTasks:
    """Return the FLOP of one microbatch's tasks on a stage of mean size."""
    forward = workload.layer_forward_flop * workload.num_layers / num_stages
    return OfTasks(forward, forward * workload.backward_to_forward, workload.loss_flop)


def time_factors(measured_for: MeasuredFor | None, tasks: OfTasks) -> OfTasks:
    """Return how many times longer than measured tasks of so many FLOP take; exactly 1 where they are the same ones."""
    if measured_for is None:
        return OfTasks(1.0, 1.0, 1.0)
    forward = _factor(tasks.forward, measured_for.forward_tflop)
    loss = forward if measured_for.loss_tflop is None else _factor(tasks.loss, measured_for.loss_tflop)
    return OfTasks(forward, _factor(tasks.backward, measured_for.backward), loss)


def _factor(flop: float, measured_tflop: float) -> float:
    factor = flop / (measured_tflop * 1e12)
    return 1.0 if abs(factor - 1) < SAME_FLOP else factor


def doubts_about_times(cluster: Cluster, workload: Workload, num_stages: int, dtype: str) -> list[str]:
    """Return in words why measured times of the cluster may not be those of the workload; nothing where they are.

    `dtype` is the number format in which the workload is computed.
    """
    if not cluster.has_times:
        return []
    measured_for, tasks = cluster.measured_for, stage_flop(workload, num_stages)
    if measured_for is None:
        facts = {"forward": tasks.forward, "backward": tasks.backward, "loss": tasks.loss}
        content = [f"dtype: {dtype}", *(f"{task}_tflop: {flop / 1e12:.4g}" for task, flop in facts.items() if flop)]
        return [
            "nothing says what the times were measured for; they are taken as they are. If it was this experiment, add "
            f"the line measured_for: {{{', '.join(content)}}}; else measure with skippipe profile"
        ]
    doubts = []
    factors = time_factors(measured_for, tasks)
    others = [
        f"{factor:.3g} ({task}: {flop / 1e12:.3g} TFLOP in place of {flop / factor / 1e12:.3g})"
        for task, flop, factor in zip(OfTasks._fields, tasks, factors, strict=True)
        if factor != 1.0
    ]
    if others:
        what = f" ({measured_for.about})" if measured_for.about else ""
        in_flight = any(node.max_in_flight is not None for node in cluster.nodes)
        kept = "; max_in_flight is kept, give memory_gib to have it follow the model" if in_flight else ""
        doubts.append(
            f"the times were measured for other tasks{what}; they are multiplied by {', '.join(others)}{kept}. "
            "Measure with skippipe profile"
        )
    if measured_for.dtype not in (None, dtype):
        doubts.append(
            f"the times were measured in {measured_for.dtype}, the experiment computes in {dtype}, at another "
            "speed; measure with skippipe profile"
        )
    return doubts


def _task_s(node: Node, measured_s: float | None, flop: float, factor: float) -> float:
    if node.compute_tflop_per_s is not None:
        return flop / (node.compute_tflop_per_s * 1e12)
    return (measured_s or 0.0) * factor


def _transfer_s(link: Link, size_bytes: int) -> float:
    return link.latency_ms / 1e3 + size_bytes * 8e-9 / link.gbit_per_s
