"""From a solution of the search, which speaks of slots, to an exactly timed plan, which names nodes."""

from collections.abc import Sequence
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
    operations = [_chain(solution, microbatch) for microbatch in range(len(solution.routes))]
    # A relay takes no time, and a loss may take none: they come before the task that starts with them.
    sequence = sorted(
        (start_s, operations[microbatch][index][1] not in ("L", "RF", "RB"), index, microbatch)
        for microbatch, row in enumerate(solution.starts)
        for index, start_s in enumerate(row)
    )
    for _, _, index, microbatch in sequence:
        slot, operation = operations[microbatch][index]
        order[names[slot]].append(Task(operation, microbatch))
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


def _relays(solution: Solution, microbatch: int) -> tuple[bool, ...]:
    """Return hop by hop whether the slot only relays."""
    return solution.relays[microbatch] if solution.relays else (False,) * len(solution.routes[microbatch])


def _chain(solution: Solution, microbatch: int) -> list[tuple[int, Operation]]:
    """Return the slot and the operation of each task of a microbatch."""
    way = list(zip(solution.routes[microbatch], _relays(solution, microbatch), strict=True))
    ahead: list[tuple[int, Operation]] = [(slot, "RF" if relays else "F") for slot, relays in way]
    back: list[tuple[int, Operation]] = [(slot, "RB" if relays else "B") for slot, relays in reversed(way)]
    return [*ahead, (way[0][0], "L"), *back]


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
