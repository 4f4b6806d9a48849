"""From a solution of the search, which speaks of slots, to an exactly timed plan, which names nodes."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

from skippipe_scheduler.errors import ProblemError
from skippipe_scheduler.plan.plan import Operation, Plan, PlanStage, Predicted, Route, Solver, Task
from skippipe_scheduler.plan.simulate import simulate
from skippipe_scheduler.slots.slot_model import SlotCosts, SlotModel
from skippipe_scheduler.slots.solution import Solution


def draft_plan(slot_model: SlotModel, solution: Solution) -> Plan:
    """Return the plan of a solution without predicted times."""
    problem, costs = slot_model.problem, SlotCosts(slot_model, solution.placement)
    names = [problem.nodes[rank] for rank in costs.placement]
    order: dict[str, list[Task]] = {name: [] for name in problem.nodes}
    operations = [_operations(solution, microbatch) for microbatch in range(len(solution.routes))]
    for slot, microbatch, index in _sequence(solution):
        order[names[slot]].append(Task(operations[microbatch][index], microbatch))
    resolved = problem.costs.model_copy(
        update={
            "forward_s": dict(zip(names, costs.forward_s, strict=True)),
            "backward_s": dict(zip(names, costs.backward_s, strict=True)),
            "weight_s": costs.weight_s(),
            "reduce_s": tuple(costs.reduce_s),
        }
    )
    layers = problem.stage_layers or (1,) * problem.num_stages
    return Plan(
        nodes=problem.nodes,
        regions=problem.regions,
        stages=_stages(layers, slot_model.stages(costs.placement)),
        microbatches=tuple(_route(solution, microbatch, names) for microbatch in range(len(solution.routes))),
        order={name: tuple(tasks) for name, tasks in order.items()},
        costs=resolved,
        rules=problem.rules,
        predicted=Predicted(iteration_s=0.0, pipeline_s=0.0, reduce_exposed_s=0.0, lower_bound_s=0.0),
        solver=Solver(name="skippipe", version="0", seed=0, time_limit_s=0.0, wall_s=0.0),
    )


def _sequence(solution: Solution) -> Iterator[tuple[int, int, int]]:
    """Yield slot, microbatch and index in its chain of all tasks; those of a slot in its order."""
    if solution.sequences:
        yield from ((slot, *task) for slot, tasks in enumerate(solution.sequences) for task in tasks)
        return
    # A loss may take no time: then it comes before the task that starts with it.
    begun = sorted(
        (start_s, index != len(solution.routes[microbatch]), index, microbatch)
        for microbatch, row in enumerate(solution.starts)
        for index, start_s in enumerate(row)
    )
    slots = [(*route, route[0], *reversed(route)) for route in solution.routes]
    yield from ((slots[microbatch][index], microbatch, index) for _, _, index, microbatch in begun)


def _relays(solution: Solution, microbatch: int) -> tuple[bool, ...]:
    """Return hop by hop whether the slot only relays."""
    return solution.relays[microbatch] if solution.relays else (False,) * len(solution.routes[microbatch])


def _operations(solution: Solution, microbatch: int) -> list[Operation]:
    """Return the operations of a microbatch's chain."""
    relays = _relays(solution, microbatch)
    ahead: list[Operation] = ["RF" if only_relays else "F" for only_relays in relays]
    back: list[Operation] = ["RB" if only_relays else "B" for only_relays in reversed(relays)]
    return [*ahead, "L", *back]


def _route(solution: Solution, microbatch: int, names: Sequence[str]) -> Route:
    path = tuple(names[slot] for slot in solution.routes[microbatch])
    relays = _relays(solution, microbatch)
    if not any(relays):
        return Route(id=microbatch, route=path)
    route = tuple(node for node, only_relays in zip(path, relays, strict=True) if not only_relays)
    return Route(id=microbatch, route=route, path=path)


def finished_plan(
    slot_model: SlotModel, solution: Solution, bound_s: float, solver: Solver, layers: Sequence[int] | None
) -> Plan:
    """Return the plan of a solution, timed by the exact simulator."""
    plan = draft_plan(slot_model, solution)
    if layers is not None:
        plan = plan.model_copy(update={"stages": _stages(layers, [stage.nodes for stage in plan.stages])})
    return plan.model_copy(update={"predicted": simulate(plan).predicted(bound_s), "solver": solver})


def _stages(layers: Sequence[int], nodes: Sequence[tuple[str, ...]]) -> tuple[PlanStage, ...]:
    if len(layers) != len(nodes) or min(layers) < 1:
        raise ProblemError(f"layers {list(layers)} must give each of {len(nodes)} stages at least one layer")
    ends = accumulate(layers)
    return tuple(
        PlanStage(layers=(end - size, end), nodes=held) for end, size, held in zip(ends, layers, nodes, strict=True)
    )
