"""Every plan of the planner passes a checker that shares no code with it, and the checker can fail."""

import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings, strategies as st
from independent_checker import Content, first_offence_of, replay, times_s
from random_plans import random_plan
from small_problems import problems, share_links
from test_validate import OFFENCES, RELAY_OFFENCES, relayed_content

from skippipe_scheduler.errors import DeadlockError, PlanError
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.simulate import simulate
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.problem.problem import AutoMicrobatches, Problem
from skippipe_scheduler.solver.solve import SolveOptions, solve

CONTENTIONS = st.sampled_from(["none", "link", "node", "shared"])


def content_of(plan: Plan) -> Content:
    content: Content = json.loads(plan.to_json())
    return content


def parsed(content: Content) -> Plan:
    return Plan.model_validate_json(json.dumps(content))


def is_valid(content: Content) -> bool:
    """Return whether the package's own validator accepts the plan."""
    try:
        validate(parsed(content))
    except PlanError:
        return False
    return True


@st.composite
def varied_problems(draw: st.DrawFn) -> Problem:
    """Placements fixed and free, mixes of lengths, origins that divide freely, shared links, reductions by bytes."""
    problem = share_links(draw(problems()), draw(CONTENTIONS))
    if draw(st.booleans()) and problem.num_stages > 2:
        shares = draw(st.sampled_from([{3: 1, 2: 1}, {3: 1, 2: 2}, {3: 3, 2: 1}]))
        mix = problem.rules.model_copy(update={"route_length": 3, "route_lengths": shares})
        problem = problem.model_copy(update={"rules": mix})
    if draw(st.booleans()):
        free = AutoMicrobatches(auto=problem.num_microbatches)
        problem = problem.model_copy(update={"microbatches_per_origin": free})
    if draw(st.booleans()):
        costs = problem.costs.model_copy(update={"reduce_s": None})
        sizes = tuple(10**8 * (stage + 1) for stage in range(problem.num_stages))
        problem = problem.model_copy(update={"stage_bytes": sizes, "costs": costs})
    if draw(st.booleans()):
        problem = problem.model_copy(update={"stage_layers": tuple(range(1, problem.num_stages + 1))})
    return problem


@settings(max_examples=20, derandomize=True)
@given(varied_problems(), st.integers(0, 3), st.sampled_from([1, 60]))
def test_plans_of_the_planner_pass(problem: Problem, seed: int, evaluations: int) -> None:
    content = content_of(solve(problem, SolveOptions(seed=seed, max_evaluations=evaluations)))
    assert first_offence_of(content) is None
    assert content["costs"]["memory"] == problem.costs.memory
    assert content["costs"]["transfer_s"] == problem.costs.transfer_s
    assert content["rules"] == json.loads(problem.rules.model_dump_json(exclude_none=True))


@pytest.mark.parametrize(("damage", "expected"), OFFENCES, ids=[damage.__name__ for damage, _ in OFFENCES])
def test_offences_that_the_validator_names_are_found(damage: Callable[[Content], None], expected: str) -> None:
    content = content_of(random_plan(5, contention="link", memory=3, num_microbatches=9))
    assert first_offence_of(content) is None
    damage(content)
    assert first_offence_of(content) is not None, expected


@pytest.mark.parametrize("damage", [damage for damage, _ in RELAY_OFFENCES], ids=lambda damage: damage.__name__)
def test_offences_of_relays_are_found(damage: Callable[[Content], None]) -> None:
    content = relayed_content()
    assert first_offence_of(content) is None
    damage(content)
    assert first_offence_of(content) is not None


def plan_with_stages(content: Content, stages: list[int]) -> None:
    """Give the first microbatch a route over the first replicas of `stages`, and move its tasks there."""
    route = [content["stages"][stage]["nodes"][0] for stage in stages]
    for tasks in content["order"].values():
        tasks[:] = [task for task in tasks if task[1] != 0]
    for node in route:
        loss = [["L", 0]] if node == route[0] else []
        content["order"][node][:0] = [["F", 0], *loss, ["B", 0]]
    content["microbatches"][0]["route"] = route
    content["costs"]["memory"] = dict.fromkeys(content["nodes"], 99)
    spans = replay(content)
    assert spans is not None
    content["predicted"] |= times_s(content, spans)


def swap_too_often(content: Content) -> None:
    content["rules"]["max_swaps"] = 1
    plan_with_stages(content, [0, 2, 1, 4, 3])


def swap_too_far(content: Content) -> None:
    plan_with_stages(content, [0, 2, 3, 1, 4])


def jump_too_far(content: Content) -> None:
    content["rules"]["max_forward_jump"] = 1
    plan_with_stages(content, [0, 2, 1, 3, 4])


def visit_too_few(content: Content) -> None:
    plan_with_stages(content, [0, 1, 2])


def skip_the_first_stage(content: Content) -> None:
    plan_with_stages(content, [1, 2, 3, 4, 0])


def visit_a_stage_twice(content: Content) -> None:
    plan_with_stages(content, [0, 1, 2, 3, 4])
    content["microbatches"][0]["route"][2] = content["microbatches"][0]["route"][1]


def ask_for_another_mix(content: Content) -> None:
    content["rules"]["route_lengths"] = {"5": 1, "4": 1}


def favour_the_smaller_rest(content: Content) -> None:
    """Six routes in shares 5 : 2 are 4.29 and 1.71, so two of them must be short; none is."""
    content["rules"]["route_lengths"] = {"5": 5, "4": 2}


RULES_BROKEN = [
    swap_too_often,
    swap_too_far,
    jump_too_far,
    visit_too_few,
    skip_the_first_stage,
    visit_a_stage_twice,
    ask_for_another_mix,
    favour_the_smaller_rest,
]


@pytest.mark.parametrize("damage", RULES_BROKEN)
def test_broken_rules_are_found_by_both(damage: Callable[[Content], None]) -> None:
    content = content_of(random_plan(3, num_nodes=6, num_stages=5, route_length=5))
    plan_with_stages(content, [0, 2, 1, 3, 4])
    assert first_offence_of(content) is None
    assert is_valid(content)
    damage(content)
    assert first_offence_of(content) is not None
    assert not is_valid(content)


def test_uneven_coverage_is_found_by_both() -> None:
    content = content_of(random_plan(1, num_nodes=4, route_length=3, num_microbatches=6))
    for stages in ([0, 1, 2], [0, 2, 3], [0, 1, 3]):
        plan_with_stages(content, stages)
        assert (first_offence_of(content) is None) == is_valid(content)
    content["microbatches"] = content["microbatches"][:1] * 6
    assert "equally often" in str(first_offence_of(content | {"microbatches": _alike(content)}))
    assert not is_valid(content | {"microbatches": _alike(content)})


def _alike(content: Content) -> list[Content]:
    return [{"id": index, "route": content["microbatches"][0]["route"]} for index in range(6)]


@pytest.mark.parametrize("relays", [0.0, 0.5])
@settings(max_examples=150, derandomize=True)
@given(st.integers(0, 10_000), CONTENTIONS, st.integers(1, 3), st.data())
def test_exchanged_tasks_are_judged_alike(
    relays: float, seed: int, contention: str, memory: int, data: st.DataObject
) -> None:
    """Exchange two neighbours in a node's order: deadlocks, memory and times are seen alike, and to rounding."""
    plan = random_plan(seed, contention=contention, memory=memory, relays=relays)  # type: ignore[arg-type]
    content = content_of(plan)
    assert first_offence_of(content) is None
    tasks = content["order"][data.draw(st.sampled_from([node for node in plan.nodes if plan.order[node]]))]
    index = data.draw(st.integers(0, len(tasks) - 2))
    tasks[index : index + 2] = reversed(tasks[index : index + 2])
    spans = replay(content)
    changed = parsed(content)
    if spans is None:
        with pytest.raises(DeadlockError):
            simulate(changed)
    else:
        content["predicted"] |= times_s(content, spans)
        assert content["predicted"]["iteration_s"] == pytest.approx(simulate(changed).iteration_s, rel=1e-12)
        assert {(span.node, span.operation, span.microbatch) for span in simulate(changed).tasks} == set(spans)
    assert (first_offence_of(content) is None) == is_valid(content)
