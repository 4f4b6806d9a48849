import pytest
from small_problems import make_problem, slot_costs

from skippipe_scheduler.budget import Budget
from skippipe_scheduler.errors import InfeasibleError
from skippipe_scheduler.slots.candidate_routes import list_routes
from skippipe_scheduler.slots.count_model import choose_routes
from skippipe_scheduler.slots.routes import balanced_routes
from skippipe_scheduler.slots.slot_model import SlotModel


@pytest.mark.parametrize("seed", range(4))
def test_chosen_routes_are_legal_and_cover_all_stages(seed: int) -> None:
    costs = slot_costs(make_problem(seed, [2, 2, 1, 2], 3, 7))
    choice = choose_routes(costs, Budget(5, 10), seed)
    slot_model = costs.slot_model
    assert tuple(route[0] for route in choice.routes) == slot_model.origins
    assert slot_model.covers(choice.routes)
    assert all(tuple(slot_model.stage_of[slot] for slot in route) in slot_model.sequences for route in choice.routes)


def test_routes_spread_over_the_replicas_of_a_stage_where_these_are_the_bottleneck() -> None:
    problem = make_problem(0, [2, 2], 2, 8, memory=1)
    roomy = problem.costs.model_copy(update={"memory": {**problem.costs.memory, "node-0": 8, "node-1": 8}})
    costs = slot_costs(problem.model_copy(update={"costs": roomy}))
    assert {route[1] for route in choose_routes(costs, Budget(5, 100), 0).routes} == {2, 3}


def test_bound_is_the_origins_residence_when_it_holds_one_at_a_time() -> None:
    costs = slot_costs(make_problem(1, [1, 1], 2, 5, memory=1))
    round_trip_s = costs.chain((0, 1)).round_trip_s
    choice = choose_routes(costs, Budget(5, 10), 0)
    assert choice.bound_s == pytest.approx(5 * round_trip_s, rel=1e-3)
    assert choice.bound_s <= 5 * round_trip_s


def test_a_short_list_has_every_route_and_a_long_one_says_it_is_not_complete() -> None:
    costs = slot_costs(make_problem(0, [2, 2, 2], 2, 4))
    listed = list_routes(costs, 0)
    assert listed.complete
    assert set(listed.routes) == {(o, s) for o in (0, 1) for s in (2, 3, 4, 5)}
    assert not list_routes(costs, 0, limit=4).complete


def test_a_limited_list_without_even_coverage_does_not_make_a_problem_infeasible() -> None:
    problem = make_problem(0, [2] * 8, 7, 9)
    rules = problem.rules.model_copy(update={"route_lengths": {7: 2, 6: 3}})
    costs = slot_costs(problem.model_copy(update={"rules": rules}))
    assert not list_routes(costs, 0).complete
    choice = choose_routes(costs, Budget(5, 10), 0)
    assert choice.bound_s == 0
    assert costs.slot_model.covers(choice.routes)


def test_a_limited_list_still_covers_every_stage() -> None:
    costs = slot_costs(make_problem(0, [2, 2, 2, 2], 3, 4))
    visited = {slot for route in list_routes(costs, 0, limit=10).routes for slot in route}
    assert {costs.slot_model.stage_of[slot] for slot in visited} == {0, 1, 2, 3}


def test_balanced_routes_visit_the_replicas_of_a_stage_equally_often() -> None:
    routes = balanced_routes(SlotModel(make_problem(0, [3, 3], 2, 9)), 0)
    visits = [sum(slot in route for route in routes) for slot in range(6)]
    assert visits == [3] * 6


def test_a_jump_that_is_too_short_is_named() -> None:
    slot_model = SlotModel(make_problem(0, [1, 1, 1, 1, 1], 2, 4, jump=1, swaps=0))
    with pytest.raises(InfeasibleError, match=r"max_forward_jump 1 .* no route gets past stage 1"):
        balanced_routes(slot_model, 0)
