"""What the plan says of the nodes and links that a live view shows."""

from collections.abc import Sequence

from skippipe.cluster.run_trace import watched_links
from skippipe.monitor.live.node_board import NodeFacts
from skippipe.monitor.live.run_status import LinkStatus
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.plan_memory import MemoryEstimate


def planned_nodes(estimates: Sequence[MemoryEstimate], own_stages: tuple[int, ...]) -> dict[str, NodeFacts]:
    """Return the facts of each process by its node; one process alone holds all the `own_stages`."""
    is_alone = len(estimates) == 1
    return {each.node: NodeFacts(own_stages if is_alone else (each.stage,), each.total_bytes) for each in estimates}


def planned_links(plan: Plan) -> tuple[LinkStatus, ...]:
    """Return the links whose messages are long enough to be measured."""
    transfer_s = plan.costs.transfer_s
    return tuple(
        LinkStatus(
            nodes=(one, other),
            planned_s=(transfer_s[one][other] + transfer_s[other][one]) / 2,
            message_bytes=plan.costs.activation_bytes,
            pace=None,
        )
        for one, other in watched_links(plan)
    )
