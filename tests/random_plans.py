"""Random valid plans for property tests: skips, swaps, relays, uneven replicas, replicas without a microbatch."""

import random
from collections.abc import Collection, Sequence

from skippipe_scheduler.plan.plan import Operation, Plan, PlanStage, Predicted, Route, Solver, Task
from skippipe_scheduler.plan.simulate import peak_held, simulate
from skippipe_scheduler.problem.costs import Costs
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.problem.sequences.listed_sequences import stage_sequences
from skippipe_scheduler.problem.sharing.capacities import Duplex, SharedCapacities, Uplink
from skippipe_scheduler.problem.sharing.contention import Contention


def random_plan(
    seed: int,
    *,
    num_nodes: int = 5,
    num_stages: int = 4,
    route_length: int = 3,
    num_microbatches: int = 6,
    layers_per_stage: int = 1,
    memory: int = 3,
    contention: Contention = "none",
    swaps: int = 1,
    time_scale_s: float = 1.0,
    split: float = 0.0,
    relays: float = 0.0,
    beside: Plan | None = None,
) -> Plan:
    """Return a valid plan drawn from `seed`; its order is a random legal one that never waits for memory.

    `split` is the share of backwards whose weight gradient is a task of its own, anywhere behind; `relays` that of the
    nodes not on a route that pass its messages on. Nodes and their stages are those of the plan `beside` where it is
    given.
    """
    generator = random.Random(seed)
    if beside is not None:
        num_nodes, num_stages = len(beside.nodes), len(beside.stages)
        layers_per_stage = beside.layers_per_stage[0]
    rules = Rules(num_stages=num_stages, route_length=route_length, max_swaps=swaps, max_forward_jump=num_stages)
    nodes = tuple(f"node-{index}" for index in range(num_nodes))
    stages = [stage.nodes for stage in beside.stages] if beside else _random_placement(generator, nodes, num_stages)
    routes = _random_routes(generator, stages, rules, num_microbatches)
    costs = _random_costs(generator, nodes, num_stages, memory, contention, time_scale_s)
    paths = [_random_path(generator, nodes, route, relays) if relays else route for route in routes]
    order = _random_order(generator, nodes, routes, paths, memory)
    plan = Plan(
        nodes=nodes,
        stages=tuple(
            PlanStage(layers=(index * layers_per_stage, (index + 1) * layers_per_stage), nodes=replicas)
            for index, replicas in enumerate(stages)
        ),
        microbatches=tuple(
            Route(id=index, route=route, path=path if relays else None)
            for index, (route, path) in enumerate(zip(routes, paths, strict=True))
        ),
        order=order,
        costs=costs,
        rules=rules,
        predicted=Predicted(iteration_s=0, pipeline_s=0, reduce_exposed_s=0, lower_bound_s=0),
        solver=Solver(name="random", version="1", seed=seed, time_limit_s=0, wall_s=0),
    )
    return with_exact_times(with_splits(plan, split, random.Random(seed)) if split else plan)


def with_splits(plan: Plan, share: float, generator: random.Random) -> Plan:
    """Return the plan with a share of the backwards split, each W as far behind its B as chance and memory let it."""
    order = {node: list(tasks) for node, tasks in plan.order.items()}
    for microbatch in plan.microbatches:
        for node in microbatch.route[1:]:
            if generator.random() >= share:
                continue
            first = order[node].index(Task("B", microbatch.id)) + 1
            place = generator.randint(first, len(order[node]))
            later = [*order[node][:place], Task("W", microbatch.id), *order[node][place:]]
            if peak_held(later) > plan.costs.memory[node]:
                later = [*order[node][:first], Task("W", microbatch.id), *order[node][first:]]
            order[node] = later
    weight_s = {node: generator.uniform(0.2, 0.8) * plan.costs.backward_s[node] for node in plan.nodes}
    costs = plan.costs.model_copy(update={"weight_s": weight_s})
    return plan.model_copy(update={"order": {node: tuple(tasks) for node, tasks in order.items()}, "costs": costs})


def with_relays(fuller: Plan, kept: Sequence[Collection[int]], rules: Rules) -> Plan:
    """Return `fuller` with only the stages `kept[m]` left on the route of microbatch m; all others relay its messages.

    Order and placement stay.
    """
    microbatches, relaying = [], set[tuple[str, int]]()
    for microbatch, stages in zip(fuller.microbatches, kept, strict=True):
        route = tuple(node for node in microbatch.route if fuller.stage_of[node] in stages)
        microbatches.append(microbatch.model_copy(update={"route": route, "path": microbatch.route}))
        relaying |= {(node, microbatch.id) for node in microbatches[-1].relays}
    left: dict[Operation, tuple[Operation, ...]] = {"F": ("RF",), "B": ("RB",), "W": ()}
    order = {
        node: tuple(
            Task(operation, task.microbatch)
            for task in tasks
            for operation in (left[task.operation] if (node, task.microbatch) in relaying else (task.operation,))
        )
        for node, tasks in fuller.order.items()
    }
    changed = {"microbatches": tuple(microbatches), "order": order, "rules": rules}
    return with_exact_times(fuller.model_copy(update=changed))


def with_exact_times(plan: Plan) -> Plan:
    """Return the plan with `predicted` as simulated."""
    return plan.model_copy(update={"predicted": simulate(plan).predicted(0.0)})


def _random_placement(generator: random.Random, nodes: Sequence[str], num_stages: int) -> list[tuple[str, ...]]:
    shuffled = generator.sample(list(nodes), len(nodes))
    stages = [[node] for node in shuffled[:num_stages]]
    for node in shuffled[num_stages:]:
        generator.choice(stages).append(node)
    return [tuple(replicas) for replicas in stages]


def _random_routes(
    generator: random.Random, stages: Sequence[tuple[str, ...]], rules: Rules, count: int
) -> list[tuple[str, ...]]:
    """Draw stage sequences so that coverage stays uniform, then any replica of each stage."""
    sequences = tuple(stage_sequences(rules))
    visits = [0] * rules.num_stages
    routes = []
    for _ in range(count):

        def spread(sequence: tuple[int, ...]) -> int:
            after = [visits[stage] + (stage in sequence) for stage in range(1, rules.num_stages)]
            return max(after) - min(after)

        best = min(spread(sequence) for sequence in sequences)
        sequence = generator.choice([sequence for sequence in sequences if spread(sequence) == best])
        for stage in sequence:
            visits[stage] += 1
        routes.append(tuple(generator.choice(stages[stage]) for stage in sequence))
    return routes


def _random_path(
    generator: random.Random, nodes: Sequence[str], route: tuple[str, ...], share: float
) -> tuple[str, ...]:
    """Return the route with other nodes behind any of its own, perhaps several behind each other."""
    path = list(route)
    for node in generator.sample(list(nodes), len(nodes)):
        if node not in route and generator.random() < share:
            path.insert(generator.randint(1, len(path)), node)
    return tuple(path)


def _random_costs(
    generator: random.Random,
    nodes: Sequence[str],
    num_stages: int,
    memory: int,
    contention: Contention,
    scale_s: float,
) -> Costs:
    def seconds(low: float, high: float) -> float:
        return generator.uniform(low, high) * scale_s

    activation_bytes = 1_000_000
    latency = {a: {b: seconds(0.0, 0.3) for b in nodes if a != b} for a in nodes}
    occupancy = {a: {b: seconds(0.1, 1.0) for b in nodes if a != b} for a in nodes}
    costs = Costs(
        forward_s={node: seconds(0.5, 1.5) for node in nodes},
        backward_s={node: seconds(1.0, 3.0) for node in nodes},
        loss_s={node: seconds(0.1, 0.3) for node in nodes},
        task_overhead_s=seconds(0.0, 0.1),
        transfer_s={a: {b: latency[a][b] + occupancy[a][b] for b in latency[a]} for a in nodes},
        memory=dict.fromkeys(nodes, memory),
        reduce_s=tuple(seconds(0.0, 2.0) for _ in range(num_stages)),
        contention=contention,
        activation_bytes=activation_bytes,
        latency_s=latency,
        gbit_per_s={a: {b: activation_bytes * 8e-9 / occupancy[a][b] for b in latency[a]} for a in nodes},
    )
    return share_capacities(costs, generator) if contention == "shared" else costs


def share_capacities(costs: Costs, generator: random.Random) -> Costs:
    """Return the costs with cards on most nodes, and two sites with uplinks, all about as fast as the links."""
    assert costs.gbit_per_s is not None
    assert costs.latency_s is not None
    assert costs.activation_bytes is not None
    links = costs.gbit_per_s
    speeds = [gbit_per_s for row in links.values() for gbit_per_s in row.values()]

    def duplex() -> Duplex:
        return Duplex(up=generator.choice(speeds), down=generator.choice(speeds) * generator.uniform(0.5, 2))

    cards = {node: duplex() for node in links if generator.random() < 0.8}
    site_of = {node: generator.randrange(3) for node in links}
    sites = [tuple(node for node in links if site_of[node] == site) for site in range(2)]
    uplinks = tuple(
        Uplink(name=f"site-{site}", nodes=nodes, gbit_per_s=duplex()) for site, nodes in enumerate(sites) if nodes
    )
    capacities = SharedCapacities.of(cards, uplinks)
    bounded = {a: {b: capacities.most_gbit_per_s(a, b, speed) for b, speed in row.items()} for a, row in links.items()}
    gbit = costs.activation_bytes * 8e-9
    latency_s = costs.latency_s
    transfer_s = {a: {b: latency_s[a][b] + gbit / speed for b, speed in row.items()} for a, row in bounded.items()}
    changed = {
        "contention": "shared",
        "card_gbit_per_s": cards,
        "uplinks": uplinks,
        "gbit_per_s": bounded,
        "transfer_s": transfer_s,
    }
    return Costs.model_validate(costs.model_dump() | changed)


def _random_order(
    generator: random.Random,
    nodes: Sequence[str],
    routes: Sequence[tuple[str, ...]],
    paths: Sequence[tuple[str, ...]],
    memory: int,
) -> dict[str, tuple[Task, ...]]:
    """Run tasks one at a time at random; a microbatch enters only where every node of its route has room for it."""
    kinds = [{node: "" if node in route else "R" for node in path} for route, path in zip(routes, paths, strict=True)]
    chains = [
        [
            *((node, f"{kind[node]}F") for node in path),
            (path[0], "L"),
            *((node, f"{kind[node]}B") for node in reversed(path)),
        ]
        for path, kind in zip(paths, kinds, strict=True)
    ]
    position = [0] * len(routes)
    held = dict.fromkeys(nodes, 0)
    order: dict[str, list[Task]] = {node: [] for node in nodes}
    active: list[int] = []
    waiting = generator.sample(range(len(routes)), len(routes))
    while active or waiting:
        open_to = [microbatch for microbatch in waiting if all(held[node] < memory for node in routes[microbatch])]
        if open_to and (not active or generator.random() < 0.5):
            microbatch = open_to[0]
            waiting.remove(microbatch)
            active.append(microbatch)
            for node in routes[microbatch]:
                held[node] += 1
        microbatch = generator.choice(active)
        node, operation = chains[microbatch][position[microbatch]]
        order[node].append(Task(operation, microbatch))  # type: ignore[arg-type]
        position[microbatch] += 1
        if operation == "B":
            held[node] -= 1
        if position[microbatch] == len(chains[microbatch]):
            active.remove(microbatch)
    return {node: tuple(tasks) for node, tasks in order.items()}
