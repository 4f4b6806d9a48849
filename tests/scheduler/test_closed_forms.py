"""Pipelines on a line whose times are known in closed form: the simulator meets them, and the planner finds them.

P stages of one node each, forward f, backward b, every hop c. The loss is the origin's, so that a microbatch hops 2P
times. GPipe (arXiv 1811.06965, section 2.3) runs all forwards first; 1F1B (PipeDream, arXiv 1806.03377, section 3.2)
alternates, so that a node holds at most K microbatches.
"""

import itertools
import time

import pytest
from small_problems import make_problem, share_links

from skippipe_scheduler.plan.plan import Task
from skippipe_scheduler.plan.simulate import Timeline, peak_held, simulate_order
from skippipe_scheduler.problem.costs import Costs
from skippipe_scheduler.problem.problem import EvenMicrobatches, Problem, StageNodes
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.solver.solve import SolveOptions, solve, solve_full_pipeline

Order = dict[str, list[Task]]


def line_problem(
    stages: int, count: int, *, forward_s: float, backward_s: float, hop_s: float, loss_s: float = 0.0, memory: int
) -> Problem:
    names = tuple(f"node-{index}" for index in range(stages))
    return Problem(
        nodes=names,
        stages=tuple(StageNodes(nodes=(name,)) for name in names),
        microbatches_per_origin=EvenMicrobatches(even=count),
        costs=Costs(
            forward_s=dict.fromkeys(names, forward_s),
            backward_s=dict.fromkeys(names, backward_s),
            loss_s=dict.fromkeys(names, loss_s),
            transfer_s={a: {b: hop_s for b in names if b != a} for a in names},
            memory=dict.fromkeys(names, memory),
        ),
        rules=Rules(num_stages=stages, route_length=stages, max_swaps=0),
    )


def gpipe(line: tuple[str, ...], count: int) -> Order:
    order = {node: [Task(what, microbatch) for what in ("F", "B") for microbatch in range(count)] for node in line}
    order[line[0]][count:count] = [Task("L", microbatch) for microbatch in range(count)]
    return order


def one_f_one_b(line: tuple[str, ...], count: int, hop_s: float, held: int) -> Order:
    """Return the order of the periodic schedule for f = b = 1: waves of `held` microbatches, one every f + b."""
    stages = len(line)
    round_s = stages * (2 + 2 * hop_s)
    starts: dict[str, list[tuple[float, bool, Task]]] = {node: [] for node in line}
    for microbatch in range(count):
        begin_s = microbatch // held * round_s + microbatch % held * 2
        for stage, node in enumerate(line):
            starts[node].append((begin_s + stage * (1 + hop_s), True, Task("F", microbatch)))
            starts[node].append((begin_s + round_s - 1 - stage * (1 + hop_s), True, Task("B", microbatch)))
        starts[line[0]].append((begin_s + stages * (1 + hop_s), False, Task("L", microbatch)))
    return {node: [task for *_, task in sorted(rows)] for node, rows in starts.items()}


def timed(problem: Problem, order: Order) -> Timeline:
    return simulate_order([problem.nodes] * problem.num_microbatches, order, problem.costs)


@pytest.mark.parametrize(
    ("stages", "count", "backward_s", "hop_s", "loss_s"),
    itertools.product([2, 3, 5], [1, 2, 7], [1.0, 2.0], [0.0, 0.3, 4.0], [0.0, 0.5]),
)
def test_gpipe(stages: int, count: int, backward_s: float, hop_s: float, loss_s: float) -> None:
    """Backwards begin at the last stage when the first loss is back there and the last forward is done, at
    the origin when they come home and the last loss is done.
    """
    problem = line_problem(
        stages, count, forward_s=1.0, backward_s=backward_s, hop_s=hop_s, loss_s=loss_s, memory=count
    )
    first_loss_s = max(stages * (1 + hop_s), count)
    last_forward_s = (stages - 1) * (1 + hop_s) + count
    backwards_s = max(first_loss_s + loss_s + hop_s, last_forward_s)
    last_loss_s = max(stages * (1 + hop_s) + count - 1 + loss_s, count * (1 + loss_s))
    home_s = max(backwards_s + (stages - 1) * (backward_s + hop_s), last_loss_s)
    expected_s = home_s + count * backward_s
    assert timed(problem, gpipe(problem.nodes, count)).iteration_s == pytest.approx(expected_s, rel=1e-12)


def one_f_one_b_s(stages: int, count: int, hop_s: float, held: int) -> float:
    """A wave of `held` every round trip; where the memory covers the round trip, that is M - 1 + P times f + b, and
    2P hops.
    """
    round_s = stages * (2 + 2 * hop_s)
    return (count - 1) // held * round_s + (count - 1) % held * 2 + round_s


@pytest.mark.parametrize(("stages", "hop_s", "extra"), itertools.product([2, 3, 4], [0.0, 1.0, 2.0], [1, 2, 5]))
@pytest.mark.parametrize("enough", [True, False])
def test_one_f_one_b(stages: int, hop_s: float, extra: int, enough: bool) -> None:
    held = stages * (1 + int(hop_s)) if enough else stages
    problem = line_problem(stages, held + extra, forward_s=1.0, backward_s=1.0, hop_s=hop_s, memory=held)
    order = one_f_one_b(problem.nodes, held + extra, hop_s, held)
    assert max(peak_held(tasks) for tasks in order.values()) <= held
    assert timed(problem, order).iteration_s == one_f_one_b_s(stages, held + extra, hop_s, held)
    if enough:
        full_rate_s = (held + extra - 1 + stages) * 2 + 2 * stages * hop_s
        assert one_f_one_b_s(stages, held + extra, hop_s, held) == full_rate_s


def least_s(problem: Problem, evaluations: int = 3000) -> float:
    return solve(problem, SolveOptions(max_evaluations=evaluations)).predicted.iteration_s


@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_origin_and_another_node_that_hold_one_microbatch_take_turns(count: int) -> None:
    problem = line_problem(2, count, forward_s=1.0, backward_s=1.7, hop_s=0.4, loss_s=0.3, memory=1)
    assert least_s(problem) == pytest.approx(count * (2 * (1 + 1.7) + 0.3 + 4 * 0.4), rel=1e-12)


@pytest.mark.parametrize(("stages", "count"), [(2, 6), (3, 6), (4, 4)])
def test_gpipe_is_the_optimum_with_memory_for_all(stages: int, count: int) -> None:
    """The last stage never waits once it has begun, and nothing could begin or end sooner."""
    problem = line_problem(stages, count, forward_s=1.0, backward_s=2.0, hop_s=0.5, memory=count)
    expected_s = (stages - 1) * (1 + 2 + 2 * 0.5) + count * (1 + 2)
    assert timed(problem, gpipe(problem.nodes, count)).iteration_s == pytest.approx(expected_s, rel=1e-12)
    assert least_s(problem) == pytest.approx(expected_s, rel=1e-9)


@pytest.mark.parametrize(("stages", "count"), [(2, 5), (3, 6), (4, 6)])
def test_memory_for_as_many_as_there_are_stages_is_enough_without_hop_time(stages: int, count: int) -> None:
    problem = line_problem(stages, count, forward_s=1.0, backward_s=1.0, hop_s=0.0, memory=stages)
    expected_s = (count + stages - 1) * (1 + 1)
    order = one_f_one_b(problem.nodes, count, 0.0, stages)
    assert timed(problem, order).iteration_s == expected_s == timed(problem, gpipe(problem.nodes, count)).iteration_s
    assert least_s(problem, 10_000) == pytest.approx(expected_s, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("memory", [3, 6])
def test_the_planned_full_pipeline_is_no_slower_than_textbook_orders(seed: int, memory: int) -> None:
    """Whatever the line: of all placements, the better of GPipe (where it fits) and 1F1B."""
    count = 6
    problem = make_problem(seed, [1, 1, 1], 2, count, memory=memory, fixed=False)
    textbook_s = []
    for line in itertools.permutations(problem.nodes):
        orders = [one_f_one_b(line, count, 0.0, 3), *([gpipe(line, count)] if memory >= count else [])]
        textbook_s += [simulate_order([line] * count, order, problem.costs).iteration_s for order in orders]
    plan = solve_full_pipeline(problem, SolveOptions(max_evaluations=3000))
    assert plan.predicted.iteration_s <= min(textbook_s) * (1 + 1e-9)


def test_a_large_plan_is_simulated_at_a_million_tasks_a_minute() -> None:
    """In processor time, with half of the speed to spare; it must not slow down as plans grow."""
    problem = line_problem(24, 1230, forward_s=1.0, backward_s=2.0, hop_s=0.5, memory=1230)
    problem = share_links(problem, "node")
    order = gpipe(problem.nodes, problem.num_microbatches)
    speeds: list[float] = []
    while len(speeds) < 3 and max(speeds, default=0.0) <= 0.5 * 1e6 / 60:  # once is enough on an idle machine
        begin_s = time.process_time()
        count = len(timed(problem, order).tasks)
        assert count > 60_000
        speeds.append(count / (time.process_time() - begin_s))
    assert max(speeds) > 0.5 * 1e6 / 60
