"""A new plan from an old one after a small change: a node gone or new, a link or node slower."""

from collections.abc import Sequence

from skippipe_scheduler.errors import InfeasibleError
from skippipe_scheduler.options import SolveOptions
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.simulate import simulate
from skippipe_scheduler.problem.problem import Problem, pins_within
from skippipe_scheduler.slots.placement import with_pins
from skippipe_scheduler.slots.slot_model import SlotModel, SlotPlacement, SlotRoute
from skippipe_scheduler.slots.solution import Solution, Starts
from skippipe_scheduler.solver.solve import solve


def replan(plan: Plan, problem: Problem, options: SolveOptions, *, layers: Sequence[int] | None = None) -> Plan:
    """Solve a problem, beginning at a plan that was made for a similar one.

    Nodes keep their stages as far as the new stage sizes allow; microbatches keep their routes and their order, but for
    those that went through a node that is gone. Where the rules or the number of microbatches are others, the search
    begins anew.

    Args:
        plan: The plan to begin at.
        problem: The problem as it is now.
        options: How long and how to search.
        layers: Layers of each stage; the problem's where not given, or one per stage.

    Returns:
        The best plan found.

    Raises:
        InfeasibleError: No plan can exist; the message names the rules that conflict.
        ProblemError: `layers` does not fit the problem.

    Examples:
        >>> smaller = without_node(problem, plan, "turin-1")
        >>> replanned = replan(plan, smaller, SolveOptions(max_evaluations=50))
        >>> replanned.nodes, replanned.visits == plan.visits
        (('paris-0', 'paris-1', 'turin-0'), True)
    """
    slot_model = SlotModel(problem)
    similar = plan.rules == problem.rules and len(plan.microbatches) == len(slot_model.origins)
    if not similar:
        return solve(problem, options, layers=layers)
    placement = slot_model.given_placement() or _placement(plan, problem)
    routes = _routes(plan, slot_model, placement)
    starts = kept_starts(plan, slot_model, placement, routes)
    warm = Solution(placement, routes, starts, iteration_s=0.0, score=0.0)
    return solve(problem, options, layers=layers, warm=warm)


def without_node(problem: Problem, plan: Plan, node: str) -> Problem:
    """Return the problem in which a node is gone and the other nodes are free to move.

    A stage that loses its only replica gets one from the stage with the most. Pinned nodes stay where their stage has
    room for them.

    Args:
        problem: The problem with the node.
        plan: A plan of it; its stages have the sizes to begin from.
        node: Name of the node that is gone.

    Returns:
        The problem without the node; stage sizes are given, the placement is free.

    Raises:
        InfeasibleError: Fewer nodes than stages are left.

    Examples:
        >>> without_node(problem, plan, "turin-1").nodes
        ('paris-0', 'paris-1', 'turin-0')
    """
    if len(problem.nodes) <= problem.num_stages:
        raise InfeasibleError(
            f"without node {node!r} {len(problem.nodes) - 1} nodes are left for {problem.num_stages} stages; "
            "add a node or plan with fewer stages"
        )
    sizes = [len([replica for replica in stage.nodes if replica != node]) for stage in plan.stages]
    for stage, size in enumerate(sizes):
        if size == 0:
            sizes[sizes.index(max(sizes))] -= 1
            sizes[stage] = 1
    rest = [index for index, name in enumerate(problem.nodes) if name != node]
    regions = None if problem.regions is None else tuple(problem.regions[index] for index in rest)
    given = problem.microbatches_per_origin
    total = {"even": problem.num_microbatches} if isinstance(given, int) else given.model_dump()
    content = problem.model_dump(exclude={"published"}) | {
        "nodes": tuple(problem.nodes[index] for index in rest),
        "regions": regions,
        "stages": None,
        "stage_sizes": tuple(sizes),
        "pinned": _pins_without(problem, node, sizes),
        "microbatches_per_origin": total,
    }
    return Problem.model_validate(content)


def _pins_without(problem: Problem, node: str, sizes: Sequence[int]) -> dict[str, int] | None:
    pinned = {name: stage for name, stage in (problem.pinned or {}).items() if name != node}
    return pins_within(pinned, sizes) or None


def _placement(plan: Plan, problem: Problem) -> SlotPlacement:
    """Keep nodes at their stages; those that are new, or too many for their stage's size, fill what is left."""
    rank = {node: index for index, node in enumerate(problem.nodes)}
    kept = [
        [rank[node] for node in stage.nodes if node in rank][:size]
        for stage, size in zip(plan.stages, problem.sizes, strict=True)
    ]
    placed = {node for nodes in kept for node in nodes}
    spare = [index for index in range(len(problem.nodes)) if index not in placed]
    for nodes, size in zip(kept, problem.sizes, strict=True):
        while len(nodes) < size:
            nodes.append(spare.pop(0))
    return with_pins(SlotModel(problem), tuple(node for nodes in kept for node in nodes))


def _routes(plan: Plan, slot_model: SlotModel, placement: SlotPlacement) -> tuple[SlotRoute, ...]:
    """Keep the routes; what is gone is replaced by the least visited replica of the same stage."""
    slot_of = {slot_model.problem.nodes[rank]: slot for slot, rank in enumerate(placement)}
    stage_of = slot_model.stage_of
    visits = [0] * len(placement)
    quota = list(slot_model.problem.microbatches_of_origins())
    routes: list[list[int]] = []
    for microbatch in plan.microbatches:
        route = []
        for node in microbatch.route:
            slot, stage = slot_of.get(node), plan.stage_of[node]
            lost = slot is None or stage_of[slot] != stage
            route.append(-1 - stage if lost or slot is None else slot)
        if route[0] >= 0 and not slot_model.problem.free_origins and quota[route[0]] == 0:
            route[0] = -1
        if route[0] >= 0:
            quota[route[0]] -= 1
        for slot in route:
            if slot >= 0:
                visits[slot] += 1
        routes.append(route)
    for route in routes:
        for hop, slot in enumerate(route):
            if slot < 0:
                choices = slot_model.slots_of[-1 - slot]
                if hop == 0 and not slot_model.problem.free_origins:
                    choices = tuple(replica for replica in choices if quota[replica] > 0)
                route[hop] = min(choices, key=lambda replica: visits[replica])
                visits[route[hop]] += 1
                if hop == 0:
                    quota[route[0]] -= 1
    return tuple(tuple(route) for route in routes)


def kept_starts(plan: Plan, slot_model: SlotModel, placement: SlotPlacement, routes: Sequence[SlotRoute]) -> Starts:
    """Return the old starts of the microbatches whose routes are as before, nothing for the others."""
    begun: dict[tuple[int, str, str], float] = {
        (task.microbatch, task.operation, task.node): task.start_s for task in simulate(plan).tasks
    }
    names = [slot_model.problem.nodes[rank] for rank in placement]
    starts: list[tuple[float, ...]] = []
    for microbatch, route in zip(plan.microbatches, routes, strict=True):
        nodes = tuple(names[slot] for slot in route)
        if nodes != microbatch.route:
            starts.append(())
            continue
        chain = [*((node, "F") for node in nodes), (nodes[0], "L"), *((node, "B") for node in reversed(nodes))]
        starts.append(tuple(begun[microbatch.id, operation, node] for node, operation in chain))
    return tuple(starts)
