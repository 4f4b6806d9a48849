"""What a run's tasks and transfers really took, as a cluster file: the next plan starts from it.

Medians over the recorded steps (`trace/`). Where a run showed nothing, the plan's costs stay.
"""

import statistics
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

from skippipe.cluster.description import write_cluster
from skippipe.cluster.rounding import rounded
from skippipe.cluster.run_trace import MeasuredTask, Trace, link_paces, read_trace
from skippipe_scheduler.errors import ProblemError
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.problem.cluster import Cluster, ClusterLinks, MeasuredFor, Node, NodeLink, load_cluster

MEASURED = "measured.yaml"


def write_measured(run_dir: Path, plan: Plan, cluster_path: Path, measured_for: MeasuredFor | None = None) -> None:
    """Write RUN/measured.yaml from RUN/trace: the cluster file of `cluster_path` with what the run really took.

    `measured_for` is what it took that for, on a stage of the plan's mean size.

    Raises `InputError` where that file does not describe the plan's nodes, `SkipPipeError` where writing fails.
    """
    cluster = load_cluster(cluster_path)
    names = tuple(node.name for node in cluster.members())
    if names != plan.nodes:
        raise ProblemError(f"{cluster_path}: its nodes are not those of the plan")
    trace = read_trace(run_dir / "trace")
    steps = {task.step for task in trace.tasks}
    comments = [
        f"Measured in the run {run_dir.name}, medians over {len(steps)} steps up to step {max(steps, default=0)}.",
        "What the run did not show is as in the cluster file that it was planned with.",
    ]
    measured = measured_cluster(plan, cluster, trace).model_copy(update={"measured_for": measured_for})
    write_cluster(run_dir / MEASURED, measured, comments)


def measured_cluster(plan: Plan, cluster: Cluster, trace: Trace) -> Cluster:
    """Return `cluster`, for which `plan` was made, with the times that `trace` shows."""
    size_bytes = plan.costs.activation_bytes or 0
    resolved = list(cluster.resolved_links())
    given_s = {
        (source, destination): link.latency_ms / 1e3 + 8e-9 * size_bytes / link.gbit_per_s
        for source, destination, link in resolved
    }
    stretch = link_paces(plan, given_s, trace)
    links = []
    for source, destination, link in resolved:
        factor = stretch.get((source, destination), 1.0)
        values = {
            "from": source,
            "to": destination,
            "latency_ms": rounded(link.latency_ms * factor),
            "gbit_per_s": rounded(link.gbit_per_s / factor),
        }
        links.append(NodeLink.model_validate(values))
    return Cluster(
        name=cluster.name,
        device=cluster.device,
        nodes=tuple(_node(node, plan, trace) for node in cluster.members()),
        links=ClusterLinks(
            contention=cluster.links.contention,
            card_gbit_per_s=cluster.links.card_gbit_per_s,
            uplink_gbit_per_s=cluster.links.uplink_gbit_per_s,
            between_nodes=tuple(links),
        ),
        task_overhead_s=rounded(_overhead_s(trace, plan.costs.task_overhead_s)),
    )


def _node(node: Node, plan: Plan, trace: Trace) -> Node:
    """Return the node with its median times, those of its stage scaled to a stage of mean size."""
    costs = plan.costs
    planned = {"F": costs.forward_s[node.name], "B": costs.backward_s[node.name], "L": costs.loss_s[node.name]}
    seen: dict[str, defaultdict[tuple[int, int], float]] = {operation: defaultdict(float) for operation in planned}
    for task in trace.tasks:
        whole = "B" if task.operation == "W" else task.operation  # a split backward is timed as one
        if task.node == node.name and whole in seen:
            seen[whole][task.step, task.microbatch] += task.end_s - task.start_s
    times = {
        operation: statistics.median(durations_s.values()) for operation, durations_s in seen.items() if durations_s
    }
    layers = plan.layers_per_stage
    scale = sum(layers) / len(layers) / layers[plan.stage_of[node.name]]
    # What a node was not seen to do, it does as much slower than planned as the rest.
    slowness = sum(times.values()) / sum(planned[operation] for operation in times) if times else 1.0
    full = {operation: times.get(operation, slowness * seconds) for operation, seconds in planned.items()}
    return node.model_copy(
        update={
            "compute_tflop_per_s": None,
            "forward_s": rounded(full["F"] * scale),
            "backward_s": rounded(full["B"] * scale),
            "loss_s": rounded(full["L"]),
        }
    )


def _overhead_s(trace: Trace, planned_s: float) -> float:
    """Return the median time between two tasks of a node in which it did not wait for a message."""
    by_node: defaultdict[tuple[int, str], list[MeasuredTask]] = defaultdict(list)
    waited_s: defaultdict[tuple[int, str, int, str], float] = defaultdict(float)
    for task in trace.tasks:
        if task.microbatch >= 0:
            by_node[task.step, task.node].append(task)
    for wait in trace.waits:
        waited_s[wait.step, wait.destination, wait.microbatch, wait.direction] += wait.end_s - wait.start_s
    gaps_s = []
    for (step, node), tasks in by_node.items():
        for before, after in pairwise(sorted(tasks, key=lambda task: task.start_s)):
            direction = "backward" if after.operation in ("B", "RB") else "forward"
            gaps_s.append(after.start_s - before.end_s - waited_s[step, node, after.microbatch, direction])
    return max(0.0, statistics.median(gaps_s)) if gaps_s else planned_s
