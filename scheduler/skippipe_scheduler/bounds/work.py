"""Bounds from what a stage's replicas do and hold."""

from collections.abc import Sequence

import numpy as np

from skippipe_scheduler.bounds.network import Network, Vector
from skippipe_scheduler.bounds.shares import least_linear_time_s
from skippipe_scheduler.bounds.walks import Idle, idle_ends


def node_work_s(network: Network, idle: Idle) -> float:
    """Return the least time in which the replicas of some stage can do that stage's tasks.

    A node with k microbatches works k times forward, backward and overheads (at an origin also the loss), less one
    overhead after its last task, and is idle before the first arrival and after its last backward.
    """
    stages: Sequence[int] = range(network.problem.num_stages)
    if not network.fixed:
        sizes, coverage = network.problem.sizes, network.slot_model.coverage
        stages = (0, max(stages[1:], key=lambda stage: coverage[stage][0] / sizes[stage]))
    return max(stage_work_s(network, idle, stage) for stage in stages)


def stage_work_s(network: Network, idle: Idle, stage: int) -> float:
    """Return the bound of `node_work_s` for one stage."""
    kind = _kind(network, stage)
    return _shared_work_s(network, stage, idle.head_s[kind] + idle.tail_s[kind])


def last_backwards_s(network: Network, idle: Idle) -> list[float]:
    """Return when the last backward of each stage can end at the earliest: without what comes after it."""
    sizes, coverage = network.problem.sizes, network.slot_model.coverage
    alike = [(_kind(network, stage), size, coverage[stage][0]) for stage, size in enumerate(sizes)]
    first = {kind: alike.index(kind) for kind in alike}
    done_s = {kind: _shared_work_s(network, stage, idle.head_s[kind[0]]) for kind, stage in first.items()}
    return [done_s[kind] for kind in alike]


def _kind(network: Network, stage: int) -> int:
    return stage if network.by_stage else min(stage, 1)


def _shared_work_s(network: Network, stage: int, idle_s: Vector) -> float:
    """Return the least time for the stage's visits on nodes that are idle for `idle_s` besides."""
    kind, nodes = _kind(network, stage), network.nodes_of_stage(stage)
    items = network.slot_model.coverage[stage][0]
    if not items:
        return 0.0
    work_s = network.work_s[kind] + 2 * network.overhead_s
    if stage == 0:
        work_s = work_s + network.loss_s + network.overhead_s
    before_s = idle_s - network.overhead_s
    if stage == 0 and network.fixed and not network.problem.free_origins:
        counts = np.array(network.counts)
        return float((before_s[nodes] + counts * work_s[nodes])[counts > 0].max())
    return least_linear_time_s(before_s[nodes], work_s[nodes], network.problem.sizes[stage], items)


def explain_work(network: Network, bound_s: float) -> str:
    """Return which stage is bound by its work, and what would help."""
    idle = idle_ends(network)
    stage = max(range(network.problem.num_stages), key=lambda stage: stage_work_s(network, idle, stage))
    replicas = network.problem.sizes[stage]
    return (
        f"Stage {stage} is bound by the work of its {replicas} replica{'s' * (replicas != 1)} ({bound_s:.3g} s): "
        "give it more or faster replicas, or fewer layers."
    )


def window_s(memory: int, staggered_s: float, overhead_s: float, open_s: float) -> float:
    """Return the most seconds (counting an overhead with each) for which a node that is open for `open_s` can hold
    microbatches, summed over them.

    Held intervals colour with `memory` colours. With k colours in use the first starts are at least a forward and an
    overhead apart and the last ends a backward and an overhead (together `staggered_s`), so all colours together lose
    k (k - 1) / 2 times that; each has an overhead less than it has intervals.
    """
    used = np.arange(memory + 1)
    return float((used * (open_s + overhead_s) - staggered_s * used * (used - 1) / 2).max())
