"""A plan for the nodes that are left when some are lost: same stages, same microbatches, other routes.

Living nodes stay where they are, because the weights of their stage are there, and microbatches keep their numbers. A
plan follows from the plan of all nodes and from who is missing alone: when everybody is back, it is the old one again.
"""

from collections import Counter
from collections.abc import Collection, Sequence

from skippipe_scheduler.errors import InfeasibleError, PlanError, nearest
from skippipe_scheduler.options import SolveOptions
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.problem.costs import Costs
from skippipe_scheduler.problem.problem import AutoMicrobatches, EvenMicrobatches, Problem, StageNodes
from skippipe_scheduler.slots.slot_model import SlotCosts, SlotModel, SlotPlacement, SlotRoute
from skippipe_scheduler.slots.solution import Solution
from skippipe_scheduler.solver.replan import kept_starts
from skippipe_scheduler.solver.solve import solve


def replan_without(plan: Plan, lost: Collection[str], options: SolveOptions) -> Plan:
    """Return a plan of the same iteration without the lost nodes.

    Stages keep their layers and living nodes their stage; the microbatches are the same, by number. Those that began at
    a lost node begin at other origins, those that went through one take a replica of its stage, and the search goes on
    from there.

    Args:
        plan: The plan of all nodes; lose nodes from this one again when the set of lost nodes changes.
        lost: Names of the nodes that are lost; with none the plan is returned as it is.
        options: How long and how to search; with `time_limit_s` 0 routes and order are only mended.

    Returns:
        The plan of the other nodes.

    Raises:
        PlanError: A lost node is not in the plan.
        InfeasibleError: A stage has no node left; the message names it.

    Examples:
        >>> lost = plan.stages[0].nodes[:1]
        >>> smaller = replan_without(plan, lost, SolveOptions(max_evaluations=50))
        >>> smaller.stages[0].nodes == plan.stages[0].nodes[1:], smaller.visits == plan.visits
        (True, True)
        >>> replan_without(plan, (), SolveOptions()).hash == plan.hash
        True
    """
    _check_lost(plan, lost)
    if not lost:
        return plan
    problem = _problem_without(plan, lost)
    slot_model = SlotModel(problem)
    placement = slot_model.given_placement() or ()
    routes = _mended_routes(plan, slot_model, placement)
    starts = kept_starts(plan, slot_model, placement, routes)
    warm = Solution(placement, routes, starts, iteration_s=0.0, score=0.0)
    return solve(problem, options, layers=plan.layers_per_stage, warm=warm)


def _check_lost(plan: Plan, lost: Collection[str]) -> None:
    unknown = sorted(node for node in lost if node not in plan.stage_of)
    if unknown:
        raise PlanError(f"lost node {unknown[0]!r} is not in the plan; {nearest(unknown[0], [*plan.nodes])}")
    for index, stage in enumerate(plan.stages):
        if not set(stage.nodes) - {*lost}:
            layers = f"layers {stage.layers[0]} to {stage.layers[1] - 1}"
            raise InfeasibleError(
                f"stage {index} ({layers}) has no node left: {', '.join(map(repr, stage.nodes))} lost; bring one of "
                "them back, or give its stage to another node",
                stage=index,
            )


def _problem_without(plan: Plan, lost: Collection[str]) -> Problem:
    """Return the problem of routing the microbatches of `plan` over its other nodes, at its own costs."""
    living = [node not in lost for node in plan.nodes]
    started = Counter(microbatch.route[0] for microbatch in plan.microbatches)
    shares = [started[node] for node in plan.stages[0].nodes]
    total = len(plan.microbatches)
    stages = tuple(tuple(node for node in stage.nodes if node not in lost) for stage in plan.stages)
    return Problem(
        about="a plan without lost nodes",
        nodes=tuple(node for node, here in zip(plan.nodes, living, strict=True) if here),
        regions=plan.regions and tuple(region for region, here in zip(plan.regions, living, strict=True) if here),
        stages=tuple(StageNodes(nodes=nodes) for nodes in stages),
        microbatches_per_origin=EvenMicrobatches(even=total)
        if max(shares) - min(shares) <= 1
        else AutoMicrobatches(auto=total),
        costs=_costs_without(plan, lost, stages),
        rules=plan.rules,
    )


def _costs_without(plan: Plan, lost: Collection[str], stages: Sequence[Sequence[str]]) -> Costs:
    """Return the costs of the other nodes.

    A reduction keeps its time, which fewer replicas rarely exceed; a node that is alone reduces nothing.
    """
    costs = plan.costs
    changed: dict[str, object] = {}
    for name in ("forward_s", "backward_s", "loss_s", "weight_s", "memory"):
        table = getattr(costs, name)
        changed[name] = table and {node: value for node, value in table.items() if node not in lost}
    for name in ("transfer_s", "latency_s", "gbit_per_s"):
        matrix = getattr(costs, name)
        changed[name] = matrix and {
            source: {sink: value for sink, value in row.items() if sink not in lost}
            for source, row in matrix.items()
            if source not in lost
        }
    changed["reduce_s"] = tuple(
        0.0 if len(nodes) == 1 < len(before.nodes) else reduce_s
        for reduce_s, nodes, before in zip(costs.reduce_s or (), stages, plan.stages, strict=True)
    )
    return costs.model_copy(update=changed)


def _mended_routes(plan: Plan, slot_model: SlotModel, placement: SlotPlacement) -> tuple[SlotRoute, ...]:
    """Keep the routes; for a lost node each takes the replica that then has the least work and detour."""
    problem, costs = slot_model.problem, SlotCosts(slot_model, placement)
    slot_of = {problem.nodes[rank]: slot for slot, rank in enumerate(placement)}
    work_s = [forward_s + backward_s for forward_s, backward_s in zip(costs.forward_s, costs.backward_s, strict=True)]
    busy_s = [0.0] * len(placement)
    quota = [*problem.microbatches_of_origins()]
    routes: list[list[int | None]] = []
    for microbatch in plan.microbatches:
        route = [slot_of.get(node) for node in microbatch.route]
        origin = route[0]
        if origin is not None and not problem.free_origins:
            route[0] = origin if quota[origin] else None
            quota[origin] -= quota[origin] > 0
        for slot in route:
            if slot is not None:
                busy_s[slot] += work_s[slot]
        routes.append(route)
    for microbatch, route in zip(plan.microbatches, routes, strict=True):
        for hop, slot in enumerate(route):
            if slot is not None:
                continue
            choices = slot_model.slots_of[plan.stage_of[microbatch.route[hop]]]
            if hop == 0 and not problem.free_origins:
                choices = tuple(replica for replica in choices if quota[replica])
            neighbours = [beside for beside in (route[hop - 1], route[(hop + 1) % len(route)]) if beside is not None]

            def cost_s(replica: int, neighbours: Sequence[int] = neighbours) -> float:
                detour_s = sum(costs.both_ways_s(replica, beside) for beside in neighbours)
                return busy_s[replica] + work_s[replica] + detour_s

            chosen = min(choices, key=cost_s)
            route[hop] = chosen
            busy_s[chosen] += work_s[chosen]
            if hop == 0:
                quota[chosen] -= 1
    return tuple(tuple(slot for slot in route if slot is not None) for route in routes)
