"""The same plan at other costs: what its routes and order take where times were measured anew."""

from collections.abc import Mapping

from skippipe_scheduler.errors import ProblemError
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.simulate import simulate
from skippipe_scheduler.problem.cluster import Cluster

NodePair = tuple[str, str]
"""Source and destination."""


def recost(plan: Plan, cluster: Cluster) -> Plan:
    """Return `plan` with the task and transfer times of `cluster`; memory and reductions stay.

    Weight gradients keep their part of the backward of each node.

    Raises `ProblemError` where the nodes are others, or have a rate instead of times (which needs a model).
    """
    nodes = {node.name: node for node in cluster.members()}
    if nodes.keys() != set(plan.nodes):
        odd = sorted(nodes.keys() ^ set(plan.nodes))[0]
        raise ProblemError(f"cluster {cluster.name}: node {odd!r} is not in both the cluster and the plan")
    costs = plan.costs
    if costs.activation_bytes is None:
        raise ProblemError("the plan does not say how many bytes an activation has (costs.activation_bytes)")
    mean = plan.num_layers / len(plan.stages)
    forward_s, backward_s, loss_s = {}, {}, {}
    for name, node in nodes.items():
        if node.forward_s is None or node.backward_s is None or node.loss_s is None:
            raise ProblemError(
                f"cluster {cluster.name}: node {name!r} has compute_tflop_per_s; give forward_s, "
                "backward_s and loss_s, or make the plan on this cluster"
            )
        weight = plan.layers_per_stage[plan.stage_of[name]] / mean
        forward_s[name], backward_s[name] = node.forward_s * weight, node.backward_s * weight
        loss_s[name] = node.loss_s
    latency_s: dict[str, dict[str, float]] = {name: {} for name in nodes}
    gbit_per_s: dict[str, dict[str, float]] = {name: {} for name in nodes}
    transfer_s: dict[str, dict[str, float]] = {name: {} for name in nodes}
    for source, destination, link in cluster.resolved_links():
        latency_s[source][destination] = link.latency_ms / 1e3
        gbit_per_s[source][destination] = link.gbit_per_s
        transfer_s[source][destination] = link.latency_ms / 1e3 + costs.activation_bytes * 8e-9 / link.gbit_per_s
    weight_s = None
    if costs.weight_s is not None:
        weight_s = {name: part_s / costs.backward_s[name] * backward_s[name] for name, part_s in costs.weight_s.items()}
    changed = {
        "forward_s": forward_s,
        "backward_s": backward_s,
        "weight_s": weight_s,
        "loss_s": loss_s,
        "task_overhead_s": cluster.task_overhead_s,
        "transfer_s": transfer_s,
        "latency_s": latency_s,
        "gbit_per_s": gbit_per_s,
        "contention": cluster.links.contention,
        "card_gbit_per_s": cluster.cards() or None,
        "uplinks": cluster.uplinks() or None,
    }
    return plan.model_copy(update={"costs": costs.model_copy(update=changed)})


def at_pace(plan: Plan, factors: Mapping[str, float], links: Mapping[NodePair, float] | None = None) -> Plan:
    """Return `plan` where tasks of each node take `factors[node]` times as long (1 where not given), exactly timed.

    A message from one node to another takes `links[source, destination]` times as long. Reductions and overheads stay.
    """
    costs, stretch = plan.costs, links or {}

    def scaled(seconds: Mapping[str, float]) -> dict[str, float]:
        return {node: value * factors.get(node, 1.0) for node, value in seconds.items()}

    def stretched(table: Mapping[str, Mapping[str, float]], power: int = 1) -> dict[str, dict[str, float]]:
        return {
            source: {sink: value * stretch.get((source, sink), 1.0) ** power for sink, value in row.items()}
            for source, row in table.items()
        }

    changed = {
        "forward_s": scaled(costs.forward_s),
        "backward_s": scaled(costs.backward_s),
        "loss_s": scaled(costs.loss_s),
        "weight_s": None if costs.weight_s is None else scaled(costs.weight_s),
        "transfer_s": stretched(costs.transfer_s),
        "latency_s": None if costs.latency_s is None else stretched(costs.latency_s),
        "gbit_per_s": None if costs.gbit_per_s is None else stretched(costs.gbit_per_s, -1),
    }
    paced = plan.model_copy(update={"costs": costs.model_copy(update=changed)})
    # All seconds times the smallest factor would shrink the bound by it, and none of them shrinks by more.
    shrunk = min(1.0, *(factors.get(node, 1.0) for node in plan.nodes), *stretch.values())
    return paced.model_copy(update={"predicted": simulate(paced).predicted(plan.predicted.lower_bound_s * shrunk)})
