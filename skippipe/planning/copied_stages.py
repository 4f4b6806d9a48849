"""Stages that one node alone holds: who keeps a copy of each (docs/recovery.md), and what that takes.

The keeper is the node behind the holder in the order of the run's nodes. Of optimizer state that the replicas of a
stage share out, each keeps that of the next one's part (`skippipe.training.optimizer.shared_adamw`).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from skippipe.config.experiment import Experiment
from skippipe.planning.workload.experiment_workload import experiment_workload
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.problem.memory import per_stage, size_text

COPIES_AT_ONCE = 2
"""On the holder and on the keeper: the newest one, and the next while it is made or comes."""


def keepers(plan: Plan, order: Sequence[str]) -> dict[int, tuple[str, str]]:
    """Return (holder, keeper) of each stage that one node of `order` alone holds, in the order of the run's nodes."""
    present = [node for node in order if node in plan.stage_of]
    if len(present) < 2:
        return {}
    holders = {index: [node for node in stage.nodes if node in present] for index, stage in enumerate(plan.stages)}
    sole = {index: nodes[0] for index, nodes in holders.items() if len(nodes) == 1}
    return {index: (node, present[(present.index(node) + 1) % len(present)]) for index, node in sole.items()}


def copies_bytes(experiment: Experiment, plan: Plan) -> dict[str, int]:
    """Return what copies take at most of the host memory of nodes, beside what the plan needs there."""
    if experiment.recovery_obstacle(len(plan.nodes)) is not None or not experiment.recovery.copy_interval:
        return {}
    workload = experiment_workload(experiment)
    of_layer = workload.layer_copy_bytes + workload.layer_shared_bytes
    of_stage = per_stage(plan.layers_per_stage, of_layer, workload.embedding_and_head_copy_bytes)
    gradients = per_stage(
        plan.layers_per_stage, workload.layer_gradient_bytes, workload.embedding_and_head_gradient_bytes
    )
    with_gradients = experiment.recovery.copy_interval == 1
    taken: Counter[str] = Counter()
    for stage, nodes in keepers(plan, plan.nodes).items():
        of_copy = of_stage[stage] + gradients[stage] * with_gradients
        taken.update(dict.fromkeys(nodes, COPIES_AT_ONCE * of_copy))
    if workload.layer_shared_bytes:
        for layers, replicas in zip(plan.layers_per_stage, (stage.nodes for stage in plan.stages), strict=True):
            if len(replicas) > 1:
                # The embedding is one tensor, which one replica copies whole.
                whole = workload.embedding_and_head_copy_bytes if replicas == plan.stages[0].nodes else 0
                taken.update(dict.fromkeys(replicas, math.ceil(layers * of_layer / len(replicas)) + whole))
    return dict(taken)


def copies_line(experiment: Experiment, plan: Plan, left_bytes: Mapping[str, int]) -> str:
    """Return a line on the node with most copies for its memory; "" where there are none.

    `left_bytes` is what the plan leaves of the memory of the nodes where that is known, and is the host's.
    """
    taken = copies_bytes(experiment, plan)
    if not taken:
        return ""
    node = max(taken, key=lambda name: taken[name] - left_bytes.get(name, 0))
    left = left_bytes.get(node)
    beyond = f", which has {size_text(max(0, left))} left" if left is not None and taken[node] > left else ""
    return (
        f"memory: if the run outlives its nodes, copies of what one node alone holds take up to "
        f"{size_text(taken[node])} more on {node}{beyond} (recovery.copy_interval: 0 keeps none)"
    )
