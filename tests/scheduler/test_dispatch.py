import random
from collections.abc import Sequence

import pytest
from hypothesis import assume, given, settings, strategies as st
from small_problems import make_problem, problems, share_links, slot_costs

from skippipe_scheduler.baselines.dispatch import (
    DISPATCH_RULES,
    best_dispatch,
    dispatch,
    dispatch_solution,
    slots_of_plan,
)
from skippipe_scheduler.errors import DeadlockError, PlanError
from skippipe_scheduler.plan.plan import Task
from skippipe_scheduler.plan.simulate import simulate
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.problem.costs import Costs
from skippipe_scheduler.problem.problem import EvenMicrobatches, Problem, StageNodes
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.slots.placement import random_placement
from skippipe_scheduler.slots.routes import balanced_routes
from skippipe_scheduler.slots.slot_model import SlotCosts, SlotModel, SlotPlacement, SlotRoute

NEVER_DEADLOCK = [name for name, rule in DISPATCH_RULES.items() if rule.reserves or rule.in_waves]


def uniform_problem(
    sizes: Sequence[int],
    microbatches: int,
    memory: int,
    *,
    length: int | None = None,
    swaps: int = 0,
    loss_s: float = 0.0,
) -> Problem:
    """Forward 1 s, backward 2 s, transfers take no time."""
    names = tuple(f"node-{index}" for index in range(sum(sizes)))
    ends = [sum(sizes[: stage + 1]) for stage in range(len(sizes))]
    return Problem(
        nodes=names,
        stages=tuple(StageNodes(nodes=names[end - size : end]) for size, end in zip(sizes, ends, strict=True)),
        microbatches_per_origin=EvenMicrobatches(even=microbatches),
        costs=Costs(
            forward_s=dict.fromkeys(names, 1.0),
            backward_s=dict.fromkeys(names, 2.0),
            loss_s=dict.fromkeys(names, loss_s),
            transfer_s={a: {b: 0.0 for b in names if b != a} for a in names},
            memory=dict.fromkeys(names, memory),
        ),
        rules=Rules(num_stages=len(sizes), route_length=length or len(sizes), max_swaps=swaps),
    )


def start(problem: Problem, seed: int = 0) -> tuple[SlotPlacement, Sequence[SlotRoute]]:
    slot_model = SlotModel(problem)
    return slot_model.given_placement() or random_placement(slot_model, seed), balanced_routes(slot_model, seed)


@settings(max_examples=40, derandomize=True)
@given(problems(), st.integers(0, 5), st.sampled_from(list(DISPATCH_RULES)))
def test_plans_are_valid_and_timed_as_the_rule_ran_them(problem: Problem, seed: int, rule: str) -> None:
    placement, routes = start(problem, seed)
    try:
        plan = dispatch(problem, placement, routes, rule)
    except DeadlockError:
        assert rule not in NEVER_DEADLOCK
        assume(False)
    validate(plan)
    solution = dispatch_solution(SlotCosts(SlotModel(problem), placement), routes, rule)
    assert plan.predicted.iteration_s == pytest.approx(solution.iteration_s)
    assert slots_of_plan(plan) == (placement, routes)


@settings(max_examples=30, derandomize=True)
@given(st.integers(0, 1000), st.sampled_from(list(DISPATCH_RULES)), st.integers(1, 2))
def test_nothing_deadlocks_where_stages_ascend(seed: int, rule: str, memory: int) -> None:
    problem = make_problem(seed, [2, 2, 1, 2], 3, 8, memory=memory, swaps=0)
    validate(dispatch(problem, *start(problem, seed), rule))


def crossing() -> tuple[Problem, SlotPlacement, Sequence[SlotRoute]]:
    """Two microbatches that hold what the other one needs."""
    problem = uniform_problem([2, 1, 1], 2, 1, swaps=1)
    return problem, (0, 1, 2, 3), ((0, 2, 3), (1, 3, 2))


def test_a_deadlock_names_who_waits() -> None:
    with pytest.raises(
        DeadlockError, match=r"node-2 holds 1 microbatches.*forward of microbatch 1.*node-3 .*microbatch 0"
    ):
        dispatch(*crossing(), "first_come")


@pytest.mark.parametrize("rule", NEVER_DEADLOCK)
def test_reserving_the_room_of_the_route_prevents_it(rule: str) -> None:
    plan = dispatch(*crossing(), rule)
    validate(plan)
    # The origins need nobody; from node-3 on the second microbatch follows the first, which leaves it at 5 s.
    assert plan.predicted.iteration_s == pytest.approx(14.0)


def test_the_best_rule_is_the_best_of_those_that_end() -> None:
    validate(best_dispatch(*crossing()))
    problem = make_problem(3, [2, 2, 2], 2, 8, memory=3, swaps=0)
    placement, routes = start(problem)
    each_s = [dispatch(problem, placement, routes, rule).predicted.iteration_s for rule in DISPATCH_RULES]
    assert best_dispatch(problem, placement, routes).predicted.iteration_s == min(each_s) < max(each_s)


def test_shared_links_are_timed_exactly() -> None:
    problem = share_links(make_problem(1, [2, 1, 1], 2, 4, swaps=0), "link")
    plan = best_dispatch(problem, *start(problem))
    validate(plan)
    assert plan.predicted.iteration_s == simulate(plan).iteration_s


def test_gpipe_sends_a_whole_wave_forward_first() -> None:
    problem = uniform_problem([1, 1, 1], 4, 4)
    plan = dispatch(problem, (0, 1, 2), ((0, 1, 2),) * 4, "gpipe")
    assert plan.order["node-2"] == tuple(
        [Task("F", microbatch) for microbatch in range(4)] + [Task("B", microbatch) for microbatch in range(4)]
    )
    assert plan.predicted.iteration_s == pytest.approx((4 + 3 - 1) * (1 + 2))  # Huang et al.: M + S - 1 slots each way


def test_gpipe_makes_waves_as_large_as_the_smallest_memory() -> None:
    problem = uniform_problem([1, 1], 4, 2)
    plan = dispatch(problem, (0, 1), ((0, 1),) * 4, "gpipe")
    assert "".join(task.operation for task in plan.order["node-1"]) == "FFBBFFBB"


def test_one_forward_one_backward_is_about_as_fast_as_gpipe_and_holds_less() -> None:
    problem = uniform_problem([1, 1, 1], 8, 8)
    timelines = {
        rule: simulate(dispatch(problem, (0, 1, 2), ((0, 1, 2),) * 8, rule))
        for rule in ("gpipe", "one_forward_one_backward")
    }
    assert timelines["gpipe"].iteration_s == pytest.approx(30.0)
    # Here the last node waits for the loss at the origin, so one microbatch more is on the way.
    assert timelines["one_forward_one_backward"].iteration_s == pytest.approx(31.0)
    assert list(timelines["gpipe"].peak_memory.values()) == [8, 8, 8]
    assert list(timelines["one_forward_one_backward"].peak_memory.values()) == [4, 3, 2]


@pytest.mark.parametrize(("rule", "first"), [("origin_with_most_left_first", 1), ("first_come", 0)])
def test_a_node_prefers_what_the_rule_says(rule: str, first: int) -> None:
    problem = uniform_problem([2, 1], 4, 8)
    plan = dispatch(problem, (0, 1, 2), ((0, 2), (1, 2), (1, 2), (1, 2)), rule)
    assert plan.order["node-2"][0] == Task("F", first)


@pytest.mark.parametrize(("rule", "second"), [("backward_first", "B"), ("forward_first", "F")])
def test_backward_or_forward_goes_first(rule: str, second: str) -> None:
    problem = uniform_problem([1, 1], 6, 6)
    order = dispatch(problem, (0, 1), ((0, 1),) * 6, rule).order["node-0"]
    waiting = [task.operation for task in order]
    # As soon as the first backward is back at the origin, forwards are left as well.
    place = waiting.index("B")
    assert ("F" in waiting[place:]) == (second == "B")


def test_an_unknown_rule_is_refused() -> None:
    problem = uniform_problem([1, 1], 1, 1)
    with pytest.raises(PlanError, match=r"dispatch rule 'fifo' is unknown; choose one of first_come"):
        dispatch(problem, (0, 1), ((0, 1),), "fifo")


def test_every_rule_ends_with_many_tasks() -> None:
    rng = random.Random(0)
    problem = uniform_problem([10] * 6, 600, 4, length=4)
    slot_model = SlotModel(problem)
    routes = tuple(
        (microbatch % 10, *(rng.choice(slot_model.slots_of[stage]) for stage in sorted(rng.sample(range(1, 6), 3))))
        for microbatch in range(600)
    )
    solutions = [dispatch_solution(slot_costs(problem), routes, rule) for rule in DISPATCH_RULES]
    work_s = 600 * 3 / 50 * 3.0
    assert all(work_s < solution.iteration_s < 20 * work_s for solution in solutions)
