"""Small scheduling problems for tests: random but feasible, from a seed."""

import random
from collections.abc import Sequence

from hypothesis import strategies as st

from skippipe_scheduler.problem.costs import Costs
from skippipe_scheduler.problem.problem import EvenMicrobatches, Problem, StageNodes
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.slots.slot_model import SlotCosts, SlotModel, SlotPlacement


def make_problem(
    seed: int,
    sizes: Sequence[int],
    route_length: int,
    microbatches: int,
    *,
    memory: int = 2,
    fixed: bool = True,
    uniform: bool = True,
    swaps: int = 1,
    distance: int = 1,
    jump: int = 4,
    overhead_s: float = 0.1,
    reduce_s: float | None = None,
    protected: Sequence[int] = (),
) -> Problem:
    """Return a problem whose nodes lie in two regions, a slow link apart."""
    rng = random.Random(seed)
    names = tuple(f"node-{index}" for index in range(sum(sizes)))
    region = {name: rng.randrange(2) for name in names}
    transfer_s = {a: {b: 0.2 if region[a] == region[b] else 1.0 + rng.random() for b in names if b != a} for a in names}
    costs = Costs(
        forward_s={name: 0.5 + rng.random() for name in names},
        backward_s={name: 1.0 + rng.random() for name in names},
        loss_s=dict.fromkeys(names, 0.25),
        task_overhead_s=overhead_s,
        transfer_s=transfer_s,
        memory=dict.fromkeys(names, memory),
        reduce_s=None if reduce_s is None else (reduce_s,) * len(sizes),
    )
    ends = [sum(sizes[: stage + 1]) for stage in range(len(sizes))]
    stages = tuple(StageNodes(nodes=names[end - size : end]) for size, end in zip(sizes, ends, strict=True))
    return Problem(
        nodes=names,
        stages=stages if fixed else None,
        stage_sizes=None if fixed else tuple(sizes),
        microbatches_per_origin=EvenMicrobatches(even=microbatches),
        costs=costs,
        rules=Rules(
            num_stages=len(sizes),
            route_length=route_length,
            max_swaps=swaps,
            max_swap_distance=distance,
            max_forward_jump=jump,
            uniform_coverage=uniform,
            protected_stages=tuple(protected),
        ),
    )


def draw_protected(draw: st.DrawFn, num_stages: int, route_length: int) -> list[int]:
    """Draw stages to protect, as often none and never more than a route can visit."""
    number = draw(st.sampled_from([0, 0, 1, route_length - 1]))
    return draw(st.lists(st.integers(1, num_stages - 1), min_size=number, max_size=number, unique=True))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Feasible problems of up to 8 nodes."""
    sizes = draw(st.lists(st.integers(1, 2), min_size=3, max_size=4))
    route_length = draw(st.integers(2, len(sizes)))
    return make_problem(
        draw(st.integers(0, 1000)),
        sizes,
        route_length,
        draw(st.integers(sizes[0], 6)),
        memory=draw(st.integers(1, 3)),
        fixed=draw(st.booleans()),
        uniform=draw(st.booleans()),
        overhead_s=draw(st.sampled_from([0.0, 0.13])),
        reduce_s=draw(st.sampled_from([None, 0.0, 3.0])),
        protected=draw_protected(draw, len(sizes), route_length),
    )


def share_links(problem: Problem, contention: str) -> Problem:
    """Return the problem with shared links: a tenth of each transfer is latency, the rest occupies the link.

    With "shared" there are random cards and uplinks, and some links are slower for it.
    """
    rows = problem.costs.transfer_s
    activation_bytes = 10**8
    update = {
        "contention": contention,
        "activation_bytes": activation_bytes,
        "latency_s": {a: {b: 0.1 * s for b, s in row.items()} for a, row in rows.items()},
        "gbit_per_s": {a: {b: activation_bytes * 8e-9 / (0.9 * s) for b, s in row.items()} for a, row in rows.items()},
    }
    costs = problem.costs.model_copy(update=update)
    if contention == "shared":
        from random_plans import share_capacities  # only here, so that programs of tests find this file alone

        costs = share_capacities(costs, random.Random(repr(rows)))
    return problem.model_copy(update={"costs": costs})


def alike(problem: Problem) -> Problem:
    """Return the problem with equal nodes in two places, a slow link apart: those of a place can be exchanged."""
    place = {name: int(problem.costs.forward_s[name] > 1.0) for name in problem.nodes}
    update = {
        "forward_s": {name: 0.6 + 0.3 * place[name] for name in problem.nodes},
        "backward_s": {name: 1.3 - 0.2 * place[name] for name in problem.nodes},
        "transfer_s": {
            a: {b: 0.2 if place[a] == place[b] else 1.0 + 0.7 * place[a] for b in row}
            for a, row in problem.costs.transfer_s.items()
        },
    }
    return problem.model_copy(update={"costs": problem.costs.model_copy(update=update)})


def given_placement(problem: Problem) -> SlotPlacement:
    """Return the placement that the problem fixes."""
    placement = SlotModel(problem).given_placement()
    assert placement is not None
    return placement


def slot_costs(problem: Problem) -> SlotCosts:
    """Return the costs by slot under the placement that the problem fixes."""
    return SlotCosts(SlotModel(problem), given_placement(problem))
