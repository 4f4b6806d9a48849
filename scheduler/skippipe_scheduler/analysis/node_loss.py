"""What a node that is lost in the middle of an iteration leaves behind: the others go on until they run dry."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.simulate import Timeline, simulate


@dataclass(frozen=True)
class NodeLoss:
    """The end of an iteration in which nodes are lost. Work counts in seconds of computation, over all nodes.

    Examples:
        >>> loss = simulate_loss(plan, {"turin-0": 0.0})
        >>> "turin-0" in loss.dry_s, loss.lost_gradient_s
        (False, 0.0)
        >>> loss.all_dry_s <= timeline.pipeline_s
        True
    """

    lost_s: dict[str, float]
    """When each lost node stops, in seconds from the start of the iteration."""
    unfinished: tuple[int, ...]
    """Microbatches whose backward never comes back to their origin, or that leave a weight gradient undone."""
    dry_s: dict[str, float]
    """When the last task of every other node ends, in seconds; 0 where it had none."""
    open_tasks: dict[str, int]
    """How many tasks of every other node are never run."""
    done_s: float
    """All the computation that there was."""
    unfinished_work_s: float
    """The part of it that went into microbatches that cannot finish."""
    lost_gradient_s: float
    """The part that went into finished microbatches on a lost node, whose gradients went with it; none once all
    gradients are reduced."""
    ended: bool
    """Whether the iteration had ended before any node was lost."""
    timeline: Timeline
    """What happened until nobody could go on."""

    @property
    def lost_work_s(self) -> float:
        """Seconds of computation that lead nowhere."""
        return self.unfinished_work_s + self.lost_gradient_s

    @property
    def all_dry_s(self) -> float:
        """When the last of the other nodes runs dry."""
        return max(self.dry_s.values(), default=0.0)


def simulate_loss(
    plan: Plan,
    lost_s: Mapping[str, float],
    *,
    slowdown: Mapping[str, float] | None = None,
    jitter_sigma: float = 0.0,
    seed: int = 0,
) -> NodeLoss:
    """Simulate an iteration in which nodes are lost; the others go on until they run dry.

    Args:
        plan: The plan.
        lost_s: When each lost node stops, in seconds from the start of the iteration, by name.
        slowdown: Factor on the task times of single nodes, by name.
        jitter_sigma: Every task and transfer takes its time by a lognormal factor of this sigma (median 1).
        seed: Seed of the jitter.

    Returns:
        How far the iteration gets, and which work is lost.

    Raises:
        DeadlockError: The order of the plan makes nodes wait for each other.

    Examples:
        >>> loss = simulate_loss(plan, {plan.stages[0].nodes[0]: timeline.pipeline_s / 2})
        >>> len(loss.unfinished) > 0, 0 < loss.lost_work_s <= loss.done_s
        (True, True)
    """
    conditions: dict[str, Any] = {"slowdown": slowdown, "jitter_sigma": jitter_sigma, "seed": seed}
    timeline = simulate(plan, **conditions)
    ended = min(lost_s.values(), default=0.0) >= timeline.iteration_s
    if not ended:
        timeline = simulate(plan, **conditions, lost_s=lost_s)
    planned = Counter(task.microbatch for tasks in plan.order.values() for task in tasks)
    finished = {
        microbatch
        for microbatch, done in Counter(task.microbatch for task in timeline.tasks).items()
        if done == planned[microbatch]
    }
    others = [node for node in plan.nodes if node not in lost_s]
    run = Counter(task.node for task in timeline.tasks)
    dry_s = dict.fromkeys(others, 0.0)
    unfinished_work_s = lost_gradient_s = 0.0
    for task in (*timeline.tasks, *timeline.cut):
        if task.microbatch not in finished:
            unfinished_work_s += task.end_s - task.start_s
        elif task.node in lost_s and not ended:
            lost_gradient_s += task.end_s - task.start_s
        if task.node in dry_s:
            dry_s[task.node] = max(dry_s[task.node], task.end_s)
    return NodeLoss(
        lost_s=dict(lost_s),
        unfinished=tuple(microbatch.id for microbatch in plan.microbatches if microbatch.id not in finished),
        dry_s=dry_s,
        open_tasks={node: len(plan.order.get(node, ())) - run[node] for node in others},
        done_s=sum(timeline.busy_s.values()),
        unfinished_work_s=unfinished_work_s,
        lost_gradient_s=lost_gradient_s,
        ended=ended,
        timeline=timeline,
    )
