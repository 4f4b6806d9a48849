"""A plan on more nodes than it was made for: those that it does not know have a place and no task."""

from skippipe_scheduler.errors import PlanError
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.simulate import simulate
from skippipe_scheduler.plan.validate import validate


def with_idle_nodes(plan: Plan, placed: Plan) -> Plan:
    """Return the iteration of `plan` on all nodes of `placed`; those that are not in `plan` have no microbatch.

    Routes, order and rules are those of `plan`, places and costs those of `placed`. A node without tasks takes part in
    the reduction of its stage.

    Raises:
        PlanError: A node of `plan` is not in `placed`, or has another place there, or the iteration is no valid plan.
    """
    moved = [node for node, stage in plan.stage_of.items() if placed.stage_of.get(node) != stage]
    if moved:
        raise PlanError(f"node {moved[0]!r} has stage {plan.stage_of[moved[0]]} in one plan and not in the other")
    idle = placed.model_copy(
        update={
            "microbatches": plan.microbatches,
            "order": {node: plan.order.get(node, ()) for node in placed.nodes},
            "rules": plan.rules,
            "solver": plan.solver,
        }
    )
    found = idle.model_copy(update={"predicted": simulate(idle).predicted(plan.predicted.lower_bound_s)})
    validate(found)
    return found
