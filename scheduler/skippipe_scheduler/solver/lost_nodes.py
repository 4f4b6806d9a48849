"""A plan for the nodes that are left when some are lost: same stages, same microbatches, other routes.

Living nodes stay where they are, because the weights of their stage are there, and microbatches keep their numbers. A
plan follows from the plan of all nodes and from who is missing alone: when everybody is back, it is the old one again.
"""

from collections import Counter
from collections.abc import Collection, Sequence

from skippipe_scheduler.errors import InfeasibleError, PlanError, nearest, refuse_text
from skippipe_scheduler.options import LostStage, SolveOptions
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.problem.costs import Costs
from skippipe_scheduler.problem.problem import AutoMicrobatches, EvenMicrobatches, Problem, StageNodes
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.slots.slot_model import SlotCosts, SlotModel, SlotPlacement, SlotRoute
from skippipe_scheduler.slots.solution import Solution
from skippipe_scheduler.solver.absent_stages import renumbered_rules, routes_around, rules_around, with_absent_stages
from skippipe_scheduler.solver.replan import kept_starts
from skippipe_scheduler.solver.solve import solve

Visits = list[tuple[int, str | None]]
"""Stages that a microbatch visits, each with the node there, where that is alive."""


def replan_without(plan: Plan, lost: Collection[str], options: SolveOptions, *, lost_stage: LostStage = "stop") -> Plan:
    """Return a plan of the same iteration without the lost nodes.

    Stages keep their layers and living nodes their stage; the microbatches are the same, by number. Those that began at
    a lost node begin at other origins, those that went through one take a replica of its stage, and the search goes on
    from there.

    Args:
        plan: The plan of all nodes; lose nodes from this one again when the set of lost nodes changes.
        lost: Names of the nodes that are lost; with none the plan is returned as it is.
        options: How long and how to search; with `time_limit_s` 0 routes and order are only mended.
        lost_stage: What becomes of a stage without any node. With "routes_around" no route visits it, and routes are
            shorter where they have to be; the plan's `rules.absent_stages` name it.

    Returns:
        The plan of the other nodes.

    Raises:
        PlanError: A lost node is not in the plan, or the plan has absent stages itself.
        InfeasibleError: A stage has no node left and may not be left out; the message names it.

    Examples:
        >>> lost = plan.stages[0].nodes[:1]
        >>> smaller = replan_without(plan, lost, SolveOptions(max_evaluations=50))
        >>> smaller.stages[0].nodes == plan.stages[0].nodes[1:], smaller.visits == plan.visits
        (True, True)
        >>> replan_without(plan, (), SolveOptions()).hash == plan.hash
        True
        >>> lost = plan.stages[2].nodes
        >>> around = replan_without(plan, lost, SolveOptions(max_evaluations=50), lost_stage="routes_around")
        >>> around.visits, around.rules.absent_stages
        ((6, 6, 0), (2,))
    """
    absent = _absent_stages(plan, lost, lost_stage)
    if not lost:
        return plan
    if not absent:
        return _planned(plan, lost, plan.rules, options)
    around = rules_around(plan.rules, absent)
    try:
        found = _planned(plan, lost, renumbered_rules(around), options)
    except InfeasibleError as reason:
        raise InfeasibleError(
            f"stage {absent[0]} has no node left, and no routes around it obey the rules (stages are numbered without "
            f"it): {reason}",
            stage=absent[0],
        ) from None
    return with_absent_stages(found, plan, around)


def _absent_stages(plan: Plan, lost: Collection[str], lost_stage: LostStage) -> tuple[int, ...]:
    """Return the stages without a living node; raise where that must not be."""
    refuse_text(lost, "lost nodes")
    unknown = sorted(node for node in lost if node not in plan.stage_of)
    if unknown:
        raise PlanError(f"lost node {unknown[0]!r} is not in the plan; {nearest(unknown[0], [*plan.nodes])}")
    if plan.rules.absent_stages:
        raise PlanError(
            f"the plan leaves out stage {plan.rules.absent_stages[0]}, so it is not the plan of all nodes; lose nodes "
            "from that one"
        )
    absent = tuple(index for index, stage in enumerate(plan.stages) if not set(stage.nodes) - {*lost})
    if absent and (absent[0] == 0 or lost_stage == "stop"):
        stage = plan.stages[absent[0]]
        remedy = "; bring one of them back, or give the stage to another node"
        if absent[0] > 0:
            remedy += ", or let routes leave it out"
        raise InfeasibleError(
            f"stage {absent[0]} (layers {stage.layers[0]} to {stage.layers[1] - 1}) has no node left: "
            f"{', '.join(map(repr, stage.nodes))} lost{remedy}",
            stage=absent[0],
        )
    return absent


def _planned(plan: Plan, lost: Collection[str], rules: Rules, options: SolveOptions) -> Plan:
    """Return the plan of the stages that have living nodes, by `rules` for these stages."""
    problem = _problem_without(plan, lost, rules)
    slot_model = SlotModel(problem)
    placement = slot_model.given_placement() or ()
    routes = _mended_routes(_kept_visits(plan, slot_model, options.seed), slot_model, placement)
    starts = kept_starts(plan, slot_model, placement, routes)
    layers = [
        count for count, stage in zip(plan.layers_per_stage, plan.stages, strict=True) if set(stage.nodes) - {*lost}
    ]
    warm = Solution(placement, routes, starts, iteration_s=0.0, score=0.0)
    return solve(problem, options, layers=layers, warm=warm)


def _problem_without(plan: Plan, lost: Collection[str], rules: Rules) -> Problem:
    """Return the problem of routing the microbatches of `plan` over its other nodes, at its own costs."""
    living = [node not in lost for node in plan.nodes]
    started = Counter(microbatch.route[0] for microbatch in plan.microbatches)
    shares = [started[node] for node in plan.stages[0].nodes]
    total = len(plan.microbatches)
    held = [tuple(node for node in stage.nodes if node not in lost) for stage in plan.stages]
    return Problem(
        about="a plan without lost nodes",
        nodes=tuple(node for node, here in zip(plan.nodes, living, strict=True) if here),
        regions=plan.regions and tuple(region for region, here in zip(plan.regions, living, strict=True) if here),
        stages=tuple(StageNodes(nodes=nodes) for nodes in held if nodes),
        microbatches_per_origin=EvenMicrobatches(even=total)
        if max(shares) - min(shares) <= 1
        else AutoMicrobatches(auto=total),
        costs=_costs_without(plan, lost, held),
        rules=rules,
    )


def _costs_without(plan: Plan, lost: Collection[str], held: Sequence[Sequence[str]]) -> Costs:
    """Return the costs of the other nodes, of which stages hold those of `held`.

    A reduction keeps its time, which fewer replicas rarely exceed; a node that is left alone reduces nothing.
    """
    costs = plan.costs
    changed: dict[str, object] = {}
    for name in ("forward_s", "backward_s", "loss_s", "weight_s", "memory", "card_gbit_per_s"):
        table = getattr(costs, name)
        changed[name] = table and {node: value for node, value in table.items() if node not in lost}
    for name in ("transfer_s", "latency_s", "gbit_per_s"):
        matrix = getattr(costs, name)
        changed[name] = matrix and {
            source: {sink: value for sink, value in row.items() if sink not in lost}
            for source, row in matrix.items()
            if source not in lost
        }
    behind = [
        uplink.model_copy(update={"nodes": tuple(node for node in uplink.nodes if node not in lost)})
        for uplink in costs.uplinks or ()
    ]
    changed["uplinks"] = tuple(uplink for uplink in behind if uplink.nodes) or None
    changed["reduce_s"] = tuple(
        0.0 if len(nodes) == 1 < len(before.nodes) else reduce_s
        for reduce_s, nodes, before in zip(costs.reduce_s or (), held, plan.stages, strict=True)
        if nodes
    )
    return costs.model_copy(update=changed)


def _kept_visits(plan: Plan, slot_model: SlotModel, seed: int) -> list[Visits]:
    """Return which stages every microbatch visits, by the numbers of the new problem, and the node where that lives."""
    stage_of = {node: stage for stage, nodes in enumerate(slot_model.problem.stages or ()) for node in nodes.nodes}
    number_of = {plan.stage_of[node]: stage for node, stage in stage_of.items()}
    routes = [tuple(plan.stage_of[node] for node in microbatch.route) for microbatch in plan.microbatches]
    visits: list[Visits] = []
    for microbatch, route in zip(plan.microbatches, routes_around(routes, slot_model, number_of, seed), strict=True):
        node_at = {stage_of[node]: node for node in microbatch.route if node in stage_of}
        visits.append([(stage, node_at.get(stage)) for stage in route])
    return visits


def _mended_routes(visits: Sequence[Visits], slot_model: SlotModel, placement: SlotPlacement) -> tuple[SlotRoute, ...]:
    """Keep the nodes; where there is none, each route takes the replica that then has the least work and detour."""
    problem, costs = slot_model.problem, SlotCosts(slot_model, placement)
    slot_of = {problem.nodes[rank]: slot for slot, rank in enumerate(placement)}
    work_s = [forward_s + backward_s for forward_s, backward_s in zip(costs.forward_s, costs.backward_s, strict=True)]
    busy_s = [0.0] * len(placement)
    quota = [*problem.microbatches_of_origins()]
    routes: list[list[int | None]] = []
    for wanted in visits:
        route = [None if node is None else slot_of[node] for _, node in wanted]
        origin = route[0]
        if origin is not None and not problem.free_origins:
            route[0] = origin if quota[origin] else None
            quota[origin] -= quota[origin] > 0
        for slot in route:
            if slot is not None:
                busy_s[slot] += work_s[slot]
        routes.append(route)
    for wanted, route in zip(visits, routes, strict=True):
        for hop, slot in enumerate(route):
            if slot is not None:
                continue
            choices = slot_model.slots_of[wanted[hop][0]]
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
