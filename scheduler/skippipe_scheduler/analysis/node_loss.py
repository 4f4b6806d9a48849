"""What a node that is lost in the middle of an iteration leaves behind: the others go on until they run dry."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.simulate import Timeline, simulate


@dataclass(frozen=True)
class NodeLoss:
    """The end of an iteration in which nodes are lost.

    `unfinished` are the microbatches whose backward never comes back to their origin, or that leave a weight gradient
    undone. `dry_s` tells for every other
    node when its last task ends (0 where it had none) and `open_tasks` how many of its tasks are never run.
    Work counts in seconds of computation, over all nodes: of all there was (`done_s`), `unfinished_work_s` went into
    microbatches that cannot finish; `lost_gradient_s` into finished ones on a lost node, whose gradients went with it.
    """

    lost_s: dict[str, float]
    unfinished: tuple[int, ...]
    dry_s: dict[str, float]
    open_tasks: dict[str, int]
    done_s: float
    unfinished_work_s: float
    lost_gradient_s: float
    timeline: Timeline

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
    """Return how far the iteration gets when the nodes in `lost_s` stop at these seconds."""
    timeline = simulate(plan, slowdown=slowdown, jitter_sigma=jitter_sigma, seed=seed, lost_s=lost_s)
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
        elif task.node in lost_s:
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
        timeline=timeline,
    )
