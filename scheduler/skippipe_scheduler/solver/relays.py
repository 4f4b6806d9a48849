"""A plan from one that visits more stages: nodes of the stages that a microbatch leaves out relay its messages.

Its messages take the links of the fuller plan, which may be faster than the one past a stage that is left out.
"""

from collections.abc import Collection, Sequence

from skippipe_scheduler.plan.plan import Operation, Plan, Task
from skippipe_scheduler.plan.simulate import simulate
from skippipe_scheduler.problem.rules import Rules

_RELAYED: dict[Operation, tuple[Operation, ...]] = {"F": ("RF",), "B": ("RB",), "W": ()}
"""What is left of the tasks of a node that only relays."""


def with_relays(fuller: Plan, kept: Sequence[Collection[int]], rules: Rules) -> Plan:
    """Return `fuller` with only the stages `kept[m]` left on the route of microbatch m; all others relay its messages.

    Order and placement stay. The plan has no lower bound of its own: it is 0.
    """
    microbatches, relaying = [], set[tuple[str, int]]()
    for microbatch, stages in zip(fuller.microbatches, kept, strict=True):
        route = tuple(node for node in microbatch.route if fuller.stage_of[node] in stages)
        microbatches.append(microbatch.model_copy(update={"route": route, "path": microbatch.whole_path}))
        relaying |= {(node, microbatch.id) for node in microbatches[-1].relays}
    order = {
        node: tuple(
            Task(operation, task.microbatch)
            for task in tasks
            for operation in (_RELAYED[task.operation] if (node, task.microbatch) in relaying else (task.operation,))
        )
        for node, tasks in fuller.order.items()
    }
    plan = fuller.model_copy(update={"microbatches": tuple(microbatches), "order": order, "rules": rules})
    return plan.model_copy(update={"predicted": simulate(plan).predicted(0.0)})
