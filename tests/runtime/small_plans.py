"""Random valid plans for the runtime: any placement, any routes of one length, any order that cannot deadlock."""

import random
from collections.abc import Sequence

from skippipe_scheduler.plan import Operation, Plan, Predicted, Route, Solver, Stage, Task
from skippipe_scheduler.problem import Costs, Rules
from skippipe_scheduler.simulate import peak_held, simulate


def random_plan(seed: int, num_nodes: int = 5, *, num_layers: int | None = None, scale_s: float = 1.0) -> Plan:
    """Return a plan with skips, swaps, uneven replicas and often a replica without any microbatch."""
    rng = random.Random(seed)
    num_stages = rng.randint(2, min(4, num_nodes))
    nodes = [f"node-{index}" for index in range(num_nodes)]
    shuffled = rng.sample(nodes, num_nodes)
    cuts = [0, *sorted(rng.sample(range(1, num_nodes), num_stages - 1)), num_nodes]
    stages = [shuffled[first:last] for first, last in zip(cuts[:-1], cuts[1:], strict=True)]
    length = rng.randint(2, num_stages)
    routes = []
    for _ in range(rng.randint(1, 5)):
        visited = [0, *rng.sample(range(1, num_stages), length - 1)]
        routes.append(tuple(rng.choice(stages[stage]) for stage in visited))
    return make_plan(nodes, stages, routes, rng, num_layers=num_layers, scale_s=scale_s)


def full_plan(seed: int, num_nodes: int, num_stages: int, num_microbatches: int) -> Plan:
    """Return a plan without skips or swaps."""
    rng = random.Random(seed)
    nodes = [f"node-{index}" for index in range(num_nodes)]
    stages = [nodes[stage::num_stages] for stage in range(num_stages)]
    routes = [tuple(rng.choice(stage) for stage in stages) for _ in range(num_microbatches)]
    return make_plan(nodes, stages, routes, rng)


def make_plan(
    nodes: Sequence[str],
    stages: Sequence[Sequence[str]],
    routes: Sequence[tuple[str, ...]],
    rng: random.Random,
    *,
    num_layers: int | None = None,
    scale_s: float = 1.0,
    contention: str = "none",
) -> Plan:
    """Return a plan whose order is that of a random run, its memory bound as tight as that order allows."""
    order = random_order(nodes, routes, rng)
    layers = num_layers or len(stages)
    cuts = [layers * index // len(stages) for index in range(len(stages) + 1)]

    def matrix(low: float, high: float) -> dict[str, dict[str, float]]:
        return {a: {b: rng.uniform(low, high) for b in nodes if b != a} for a in nodes}

    latency_s = matrix(0.0, 0.5 * scale_s)
    gbit_per_s = matrix(0.5, 2.0)
    activation_bytes = max(1, round(scale_s * 0.3e9 / 8))
    transfer_s = {
        a: {b: latency_s[a][b] + activation_bytes * 8e-9 / gbit_per_s[a][b] for b in row}
        for a, row in latency_s.items()
    }
    costs = Costs(
        forward_s={node: scale_s * rng.uniform(0.5, 1.5) for node in nodes},
        backward_s={node: scale_s * rng.uniform(1.0, 3.0) for node in nodes},
        loss_s={node: scale_s * rng.choice([0.0, 0.3]) for node in nodes},
        task_overhead_s=scale_s * rng.choice([0.0, 0.1]),
        transfer_s=transfer_s,
        memory={node: max(1, peak_held(order[node])) for node in nodes},
        reduce_s=tuple(scale_s * rng.uniform(0, 1) for _ in stages),
        contention=contention,  # type: ignore[arg-type]
        activation_bytes=activation_bytes,
        latency_s=latency_s,
        gbit_per_s=gbit_per_s,
    )
    plan = Plan(
        nodes=tuple(nodes),
        stages=tuple(
            Stage(layers=(first, last), nodes=tuple(held))
            for first, last, held in zip(cuts[:-1], cuts[1:], stages, strict=True)
        ),
        microbatches=tuple(Route(id=index, route=route) for index, route in enumerate(routes)),
        order=order,
        costs=costs,
        rules=Rules(num_stages=len(stages), route_length=len(routes[0])),
        predicted=Predicted(iteration_s=0.0, pipeline_s=0.0, reduce_exposed_s=0.0, lower_bound_s=0.0),
        solver=Solver(name="random", version="1", seed=0, time_limit_s=0.0, wall_s=0.0),
    )
    timeline = simulate(plan)
    predicted = Predicted(
        iteration_s=timeline.iteration_s,
        pipeline_s=timeline.pipeline_s,
        reduce_exposed_s=timeline.reduce_exposed_s,
        lower_bound_s=0.0,
    )
    return plan.model_copy(update={"predicted": predicted})


def random_order(
    nodes: Sequence[str], routes: Sequence[tuple[str, ...]], rng: random.Random
) -> dict[str, tuple[Task, ...]]:
    """Advance random microbatches one task at a time; the order in which this happens cannot deadlock."""
    order: dict[str, list[Task]] = {node: [] for node in nodes}
    remaining: dict[int, list[tuple[str, Operation]]] = {
        index: [
            *((node, "F") for node in route),
            (route[0], "L"),
            *((node, "B") for node in reversed(route)),
        ]
        for index, route in enumerate(routes)
    }
    while remaining:
        microbatch = rng.choice(sorted(remaining))
        node, operation = remaining[microbatch].pop(0)
        order[node].append(Task(operation, microbatch))
        if not remaining[microbatch]:
            del remaining[microbatch]
    return {node: tuple(tasks) for node, tasks in order.items()}
