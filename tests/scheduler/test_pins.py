"""Nodes that must hold a given stage: every search leaves them there."""

import random
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from pydantic import ValidationError
from small_problems import make_problem
from test_build import build, make_cluster

from skippipe_scheduler.baselines.full_and_blind import full_pipeline_problem
from skippipe_scheduler.baselines.paper_method.method import solve_paper_method
from skippipe_scheduler.errors import InfeasibleError, ProblemError
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.search.local_search import LocalSearch
from skippipe_scheduler.slots.placement import random_placement, regional_placement
from skippipe_scheduler.slots.routes import balanced_routes
from skippipe_scheduler.slots.slot_model import SlotModel, SlotPlacement
from skippipe_scheduler.solver.replan import replan, without_node
from skippipe_scheduler.solver.solve import SolveOptions, solve, solve_full_pipeline, solve_network_blind

SHORT = SolveOptions(max_evaluations=100)


def pin(problem: Problem, pinned: dict[str, int]) -> Problem:
    return Problem.model_validate(problem.model_dump() | {"pinned": pinned})


@st.composite
def pinned_problems(draw: st.DrawFn) -> Problem:
    """Up to 9 nodes in two regions, any number of them pinned anywhere."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=3, max_size=3))
    problem = make_problem(draw(st.integers(0, 1000)), sizes, draw(st.integers(2, 3)), max(4, sizes[0]), fixed=False)
    nodes = random.Random(draw(st.integers(0, 1000))).sample(problem.nodes, len(problem.nodes))
    stage_of = dict(zip(nodes, SlotModel(problem).stage_of, strict=True))
    chosen = draw(st.sets(st.sampled_from(problem.nodes)))
    regions = tuple(draw(st.sampled_from("ab")) for _ in nodes) if draw(st.booleans()) else None
    content = problem.model_dump() | {"pinned": {node: stage_of[node] for node in sorted(chosen)}, "regions": regions}
    return Problem.model_validate(content)


def keeps_pins(problem: Problem, plan: Plan) -> bool:
    return all(plan.stage_of[node] == stage for node, stage in (problem.pinned or {}).items())


def is_allowed(slot_model: SlotModel, placement: SlotPlacement) -> bool:
    names = [slot_model.problem.nodes[rank] for rank in placement]
    pins = slot_model.problem.pinned or {}
    at_home = all(pins.get(name, stage) == stage for name, stage in zip(names, slot_model.stage_of, strict=True))
    return at_home and sorted(names) == sorted(slot_model.problem.nodes)


@settings(max_examples=5, derandomize=True)
@given(pinned_problems())
def test_plans_keep_the_pins(problem: Problem) -> None:
    plan = solve(problem, SHORT)
    validate(plan)
    assert keeps_pins(problem, plan)
    assert keeps_pins(problem, solve_paper_method(problem, max_generations=20))
    blind = solve_network_blind(problem, SHORT)
    validate(blind)
    assert keeps_pins(problem, blind)


@settings(max_examples=50, derandomize=True)
@given(pinned_problems(), st.integers(0, 100))
def test_placements_to_begin_from_keep_the_pins(problem: Problem, seed: int) -> None:
    slot_model = SlotModel(problem)
    search = LocalSearch(slot_model, seed)
    for placement in (random_placement(slot_model, seed), regional_placement(slot_model)):
        assert is_allowed(slot_model, placement)
        lighter, _ = search.balance_loads(placement, balanced_routes(slot_model, seed), 500)
        assert is_allowed(slot_model, lighter)


@settings(max_examples=5, derandomize=True)
@given(pinned_problems(), st.data())
def test_plans_from_older_plans_keep_the_pins(problem: Problem, data: st.DataObject) -> None:
    free = solve(problem.model_copy(update={"pinned": None}), SHORT)
    assert keeps_pins(problem, replan(free, problem, SHORT))
    if len(problem.nodes) > problem.num_stages:
        lost = data.draw(st.sampled_from(problem.nodes))
        smaller = without_node(problem, free, lost)
        found = replan(free, smaller, SHORT)
        validate(found)
        assert keeps_pins(smaller, found)
        assert lost not in (smaller.pinned or {})
        assert (smaller.pinned or {}).items() <= (problem.pinned or {}).items()


def test_pins_decide_the_placement_and_free_nodes_still_move() -> None:
    problem = make_problem(4, [1, 1, 1], 3, 3, fixed=False)
    slowest = max(problem.nodes, key=lambda node: problem.costs.backward_s[node])
    everywhere = {solve(pin(problem, {slowest: stage}), SHORT).stage_of[slowest] for stage in range(3)}
    assert everywhere == {0, 1, 2}
    starts = {random_placement(SlotModel(pin(problem, {slowest: 1})), seed) for seed in range(20)}
    assert len(starts) == 2
    best = solve(problem, SolveOptions(max_evaluations=2000))
    some = dict(list(best.stage_of.items())[:1])
    same = solve(pin(problem, some), SolveOptions(max_evaluations=2000))
    assert same.predicted.iteration_s == pytest.approx(best.predicted.iteration_s)


def test_a_pin_counts_the_memory_of_its_stage_and_frees_others_from_it() -> None:
    cluster = make_cluster(memory_gib=4.0)
    sizes = (2, 2, 1, 1)
    memory = build(cluster, stage_sizes=sizes, pinned={"n4": 3}, num_microbatches=13).costs.memory
    assert (memory["n4"], memory["n0"]) == (13, 6)
    origins = {"n0": 0, "n1": 0}
    memory = build(cluster, stage_sizes=sizes, pinned=origins, num_microbatches=13).costs.memory
    assert (memory["n0"], memory["n4"]) == (6, 13)


def test_nodes_too_small_for_stage_0_where_others_are_pinned_to_it() -> None:
    cluster = make_cluster(memory_gib=1.25)
    with pytest.raises(InfeasibleError, match="embedding and head"):
        build(cluster)
    problem = build(cluster, stage_sizes=(1, 2, 2, 1), pinned={"slow": 0})
    assert problem.costs.memory["n0"] == 3


def test_full_pipeline_keeps_the_pins_where_they_fit() -> None:
    problem = make_problem(0, [3, 1, 1], 2, 6, fixed=False)
    pinned, all_three = pin(problem, {"node-0": 0}), pin(problem, {"node-0": 0, "node-1": 0, "node-2": 0})
    assert {variant.stage_sizes for variant in full_pipeline_problem(pinned)} == {(2, 2, 1), (2, 1, 2), (1, 2, 2)}
    assert solve_full_pipeline(pinned, SHORT).stage_of["node-0"] == 0
    kept = {tuple(variant.pinned or {}) for variant in full_pipeline_problem(all_three)}
    assert kept == {("node-0", "node-1"), ("node-0",)}


def test_full_pipeline_opens_no_stage_to_nodes_that_may_not_fit_it() -> None:
    problem = pin(make_problem(0, [1, 2, 2], 2, 6, fixed=False), {"node-3": 0})
    assert [variant.stage_sizes for variant in full_pipeline_problem(problem)] == [(1, 2, 2)]


@pytest.mark.parametrize(
    ("pinned", "message"),
    [
        ({"slwo": 0}, "pinned: unknown node 'slwo'; did you mean 'slow'"),
        ({"n0": 4}, "pinned: node 'n0' is at stage 4; stages are 0 to 3"),
        ({"n0": -1}, "pinned: node 'n0' is at stage -1"),
        ({"n0": 2, "n1": 2}, "at stage 2, which has room for 1 of 6 nodes; pin fewer nodes there or give other stage"),
        (
            {f"n{rank}": 2 for rank in range(4)},
            "4 nodes are at stage 2, which has room for 1 of 6 nodes; pin fewer nodes there(?! or)",
        ),
    ],
)
def test_pins_that_do_not_fit(pinned: dict[str, int], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        build(pinned=pinned, stage_sizes=(2, 2, 1, 1))
    content = build(stage_sizes=(2, 2, 1, 1)).model_dump() | {"pinned": pinned}
    with pytest.raises(ValidationError, match=message if min(pinned.values()) >= 0 else "greater than or equal to 0"):
        Problem.model_validate(content)


def test_pins_beside_a_placement() -> None:
    placement: Any = [["n0", "n1"], ["n2", "n3"], ["n4"], ["slow"]]
    with pytest.raises(ProblemError, match="leave pinned out"):
        build(placement=placement, pinned={"n0": 0})
    with pytest.raises(ValidationError, match="leave pinned out"):
        Problem.model_validate(build(placement=placement).model_dump() | {"pinned": {"n0": 0}})
