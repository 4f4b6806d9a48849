"""The validator: proves a plan from its own content, trusting nothing that the planner said."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from skippipe_scheduler.errors import PlanError
from skippipe_scheduler.plan.plan import Operation, Plan, Route, Task, parse_plan
from skippipe_scheduler.plan.simulate import OPERATION_NAMES, peak_held, simulate
from skippipe_scheduler.problem.rules import coverage_offence, first_offence, length_offence

RELATIVE_TOLERANCE = 1e-6
ABSOLUTE_TOLERANCE_S = 1e-9
EARLIER: Mapping[Operation, Sequence[Operation]] = {
    "F": (),
    "L": ("F",),
    "B": ("F", "L"),
    "W": ("B",),
    "RF": (),
    "RB": ("RF",),
}
"""The tasks of a microbatch that stand before one of its others on the same node."""


def load_plan(path: str | Path) -> Plan:
    """Read a plan file and prove it.

    Args:
        path: The file.

    Returns:
        The plan, which obeys every rule and takes the times that it predicts.

    Raises:
        PlanError: The file cannot be read, or the plan breaks a rule; the message has the file and the first offence.
            `DeadlockError` is one of its kinds.

    Examples:
        >>> plan.save(Path("plan.json"))
        >>> load_plan(Path("plan.json")) == plan
        True
    """
    path = Path(path)
    plan = parse_plan(path)
    try:
        validate(plan)
    except PlanError as offence:
        raise type(offence)(f"{path}: {offence}") from None
    return plan


def validate(plan: Plan) -> None:
    """Prove a plan from its own content, by the rules of the page on the plan file.

    Args:
        plan: The plan.

    Raises:
        PlanError: The plan breaks a rule; the message names the first offence. `DeadlockError` is one of its kinds.

    Examples:
        >>> validate(plan)
        >>> route = plan.microbatches[0].model_copy(update={"id": 7})
        >>> validate(plan.model_copy(update={"microbatches": (route, *plan.microbatches[1:])}))
        Traceback (most recent call last):
        skippipe_scheduler.errors.PlanError: microbatches.0: id is 7; ids count 0, 1, 2, ... without gaps
    """
    checks: tuple[Callable[[Plan], None], ...] = (
        _check_placement,
        _check_layers,
        _check_costs,
        _check_routes,
        _check_coverage,
        _check_order,
        _check_memory,
        _check_times,
    )
    for check in checks:
        check(plan)


def _check_placement(plan: Plan) -> None:
    repeated = [node for node, times in Counter(plan.nodes).items() if times > 1]
    if repeated:
        raise PlanError(f"nodes: {repeated[0]!r} is named twice")
    if plan.regions is not None and len(plan.regions) != len(plan.nodes):
        raise PlanError(f"regions: {len(plan.regions)} entries for {len(plan.nodes)} nodes")
    if len(plan.stages) != plan.rules.num_stages:
        raise PlanError(f"stages: there are {len(plan.stages)}, rules.num_stages is {plan.rules.num_stages}")
    absent = plan.rules.absent_stages or ()
    for index, stage in enumerate(plan.stages):
        if not stage.nodes and index not in absent:
            raise PlanError(f"stages.{index}: has no node; give it one, or name it in rules.absent_stages")
        if stage.nodes and index in absent:
            raise PlanError(f"stages.{index}: has node {stage.nodes[0]!r}, but rules.absent_stages name it")
    holders = Counter(node for stage in plan.stages for node in stage.nodes)
    for node, times in holders.items():
        if node not in plan.nodes:
            raise PlanError(f"stages: unknown node {node!r}")
        if times > 1:
            raise PlanError(f"stages: node {node!r} holds more than one stage")
    idle = [node for node in plan.nodes if node not in holders]
    if idle:
        raise PlanError(f"stages: node {idle[0]!r} holds no stage")


def _check_layers(plan: Plan) -> None:
    expected = 0
    for index, stage in enumerate(plan.stages):
        first, last = stage.layers
        if first != expected:
            wrong = "held by nobody" if first > expected else "held twice"
            raise PlanError(f"stages.{index}: begins at layer {first}, layer {min(first, expected)} is {wrong}")
        if last <= first:
            raise PlanError(f"stages.{index}: holds no layer ({first} to {last})")
        expected = last


def _check_costs(plan: Plan) -> None:
    gap = plan.costs.missing(plan.nodes)
    if gap:
        raise PlanError(gap)
    unknown = sorted((plan.costs.weight_s or {}).keys() - set(plan.nodes))
    if unknown:
        raise PlanError(f"costs.weight_s: unknown node {unknown[0]!r}")
    if plan.costs.reduce_s is None or len(plan.costs.reduce_s) != len(plan.stages):
        given = 0 if plan.costs.reduce_s is None else len(plan.costs.reduce_s)
        raise PlanError(f"costs.reduce_s: {given} entries for {len(plan.stages)} stages")
    if plan.costs.contention == "none" or plan.costs.latency_s is None:
        return
    for source in plan.nodes:
        for destination in plan.nodes:
            if source == destination:
                continue
            parts_s = plan.costs.latency_s[source][destination] + plan.costs.occupancy_s(source, destination)
            if not _equal(plan.costs.transfer_s[source][destination], parts_s):
                raise PlanError(
                    f"costs.transfer_s from {source!r} to {destination!r}: "
                    f"{plan.costs.transfer_s[source][destination]:.9g} s, but latency + bytes / bandwidth is "
                    f"{parts_s:.9g} s"
                )


def _check_routes(plan: Plan) -> None:
    for index, microbatch in enumerate(plan.microbatches):
        if microbatch.id != index:
            raise PlanError(f"microbatches.{index}: id is {microbatch.id}; ids count 0, 1, 2, ... without gaps")
        unknown = [node for node in microbatch.route if node not in plan.stage_of]
        if unknown:
            raise PlanError(f"microbatches.{index}: unknown node {unknown[0]!r} on the route")
        offence = first_offence([plan.stage_of[node] for node in microbatch.route], plan.rules)
        if offence:
            raise PlanError(f"microbatches.{index}: the route {offence}")
        _check_path(plan, microbatch)
    if not plan.microbatches:
        raise PlanError("microbatches: there are none")


def _check_path(plan: Plan, microbatch: Route) -> None:
    path, place = microbatch.whole_path, f"microbatches.{microbatch.id}: the path"
    unknown = [node for node in path if node not in plan.stage_of]
    if unknown:
        raise PlanError(f"{place} has the unknown node {unknown[0]!r}")
    repeated = [node for node, times in Counter(path).items() if times > 1]
    if repeated:
        raise PlanError(f"{place} comes to {repeated[0]!r} twice")
    if path[0] != microbatch.route[0]:
        raise PlanError(f"{place} begins at {path[0]!r}, the route at {microbatch.route[0]!r}")
    visited = tuple(node for node in path if node in microbatch.route)
    if visited != microbatch.route:
        raise PlanError(f"{place} comes to {', '.join(visited)}; the route is {', '.join(microbatch.route)}")


def _check_coverage(plan: Plan) -> None:
    offence = coverage_offence(plan.visits, plan.rules) or length_offence(
        (len(microbatch.route) for microbatch in plan.microbatches), plan.rules
    )
    if offence:
        raise PlanError(f"microbatches: {offence}")


def _check_order(plan: Plan) -> None:
    unknown = [node for node in plan.order if node not in plan.stage_of]
    if unknown:
        raise PlanError(f"order: unknown node {unknown[0]!r}")
    expected: dict[str, list[Task]] = {node: [] for node in plan.nodes}
    for microbatch in plan.microbatches:
        for node in microbatch.route:
            expected[node] += [Task("F", microbatch.id), Task("B", microbatch.id)]
        expected[microbatch.route[0]].append(Task("L", microbatch.id))
        for node in microbatch.relays:
            expected[node] += [Task("RF", microbatch.id), Task("RB", microbatch.id)]
    splittable: dict[str, set[Task]] = {node: set() for node in plan.nodes}
    for microbatch in plan.microbatches:
        for node in microbatch.route[1:]:
            splittable[node].add(Task("W", microbatch.id))
    for node in plan.nodes:
        tasks = plan.order.get(node, ())
        if plan.split_of[node] and node not in (plan.costs.weight_s or {}):
            raise PlanError(
                f"order.{node}: has the weight gradient of microbatch {min(plan.split_of[node])}, "
                "but costs.weight_s has no entry for this node"
            )
        _check_order_of_node(node, tasks, [*expected[node], *splittable[node].intersection(tasks)])


def _check_order_of_node(node: str, tasks: tuple[Task, ...], expected: list[Task]) -> None:
    repeated = [task for task, times in Counter(tasks).items() if times > 1]
    if repeated:
        raise PlanError(f"order.{node}: {_words(repeated[0])} is listed twice")
    extra = sorted(set(tasks) - set(expected))
    if extra:
        raise PlanError(f"order.{node}: {_words(extra[0])} does not belong there")
    missing = sorted(set(expected) - set(tasks))
    if missing:
        raise PlanError(f"order.{node}: {_words(missing[0])} is missing")
    position = {task: index for index, task in enumerate(tasks)}
    for task in tasks:
        for before in EARLIER[task.operation]:
            if position.get(Task(before, task.microbatch), -1) > position[task]:
                raise PlanError(f"order.{node}: {_words(task)} stands before its {OPERATION_NAMES[before]}")


def _check_memory(plan: Plan) -> None:
    for node in plan.nodes:
        held = peak_held(plan.order.get(node, ()))
        if held > plan.costs.memory[node]:
            raise PlanError(
                f"order.{node}: holds {held} microbatches at once, costs.memory allows {plan.costs.memory[node]}"
            )


def _check_times(plan: Plan) -> None:
    timeline = simulate(plan)
    for name in ("iteration_s", "pipeline_s", "reduce_exposed_s"):
        promised, exact = getattr(plan.predicted, name), getattr(timeline, name)
        scale_s = max(abs(exact), timeline.iteration_s if name == "reduce_exposed_s" else 0.0)
        if abs(promised - exact) > RELATIVE_TOLERANCE * scale_s + ABSOLUTE_TOLERANCE_S:
            raise PlanError(f"predicted.{name}: {promised:.9g} s, but the plan takes {exact:.9g} s")
    if plan.predicted.lower_bound_s > timeline.iteration_s * (1 + RELATIVE_TOLERANCE):
        raise PlanError(
            f"predicted.lower_bound_s: {plan.predicted.lower_bound_s:.9g} s is above the iteration's "
            f"{timeline.iteration_s:.9g} s"
        )


def _equal(first: float, second: float) -> bool:
    return abs(first - second) <= RELATIVE_TOLERANCE * max(abs(first), abs(second)) + ABSOLUTE_TOLERANCE_S


def _words(task: Task) -> str:
    return f"the {OPERATION_NAMES[task.operation]} of microbatch {task.microbatch}"
