import itertools
import random
import time
from collections.abc import Sequence

import pytest
from crowding import at_most_s
from hypothesis import given, settings, strategies as st
from small_problems import make_problem, problems, slot_costs

from skippipe_scheduler.baselines.paper_method import solve_paper_method
from skippipe_scheduler.baselines.paper_method.agents import Agent, groupings, wave_of
from skippipe_scheduler.baselines.paper_method.conflict_search import path_sets
from skippipe_scheduler.baselines.paper_method.genetic_placement import (
    bottleneck_matching_s,
    genetic_placement,
    shortest_tour,
)
from skippipe_scheduler.baselines.paper_method.paths import Constraints, PathFinder
from skippipe_scheduler.budget import Budget
from skippipe_scheduler.errors import InfeasibleError
from skippipe_scheduler.plan.simulate import simulate
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.problem.problem import AutoMicrobatches, Problem
from skippipe_scheduler.problem.sequences.listed_sequences import stage_sequences
from skippipe_scheduler.slots.slot_model import SlotCosts, SlotModel, SlotRoute


@settings(max_examples=25, derandomize=True)
@given(problems(), st.integers(0, 3))
def test_plans_of_random_problems_are_valid_and_exact(problem: Problem, seed: int) -> None:
    plan = solve_paper_method(problem, seed=seed, max_generations=20)
    validate(plan)
    assert simulate(plan).iteration_s == plan.predicted.iteration_s
    assert plan.rules == problem.rules
    starts = [sum(microbatch.route[0] == origin for microbatch in plan.microbatches) for origin in plan.stages[0].nodes]
    assert tuple(starts) == problem.microbatches_of_origins()


def test_mixed_lengths_and_free_origins_are_obeyed() -> None:
    problem = make_problem(0, [2, 2, 2, 2], 4, 8, fixed=False)
    mixed = problem.rules.model_copy(update={"route_lengths": {4: 1, 2: 1}})
    update = {"rules": mixed, "microbatches_per_origin": AutoMicrobatches(auto=8)}
    plan = solve_paper_method(problem.model_copy(update=update), max_generations=20)
    validate(plan)
    assert sorted(len(microbatch.route) for microbatch in plan.microbatches) == [2] * 4 + [4] * 4


def test_same_seed_and_generations_give_the_same_plan() -> None:
    problem = make_problem(1, [2, 2, 2], 2, 8, fixed=False)
    first, again = (solve_paper_method(problem, seed=4, max_generations=40) for _ in range(2))
    assert first.to_json() == again.to_json()


def test_the_time_limit_is_kept_and_used_where_more_could_be_found() -> None:
    problem = make_problem(1, [3, 2, 2, 2], 3, 12, fixed=False)
    begin_s = time.perf_counter()
    plan = solve_paper_method(problem, budget_s=2.0)
    assert time.perf_counter() - begin_s < at_most_s(3.0)
    validate(plan)


def test_knowing_the_network_beats_even_routes() -> None:
    problem = make_problem(2, [2, 2, 2], 2, 8)
    few = solve_paper_method(problem, max_generations=1).predicted.iteration_s
    many = solve_paper_method(problem, max_generations=300).predicted.iteration_s
    assert many < few


def test_rules_that_no_route_can_obey_are_named() -> None:
    with pytest.raises(InfeasibleError, match=r"uniform_coverage, .* cannot be met together"):
        solve_paper_method(make_problem(0, [1] * 5, 2, 4, jump=1, swaps=0), max_generations=5)


@pytest.mark.parametrize("seed", range(5))
def test_bottleneck_matching_is_the_best_of_all_matchings(seed: int) -> None:
    rng = random.Random(seed)
    edge_s = [[rng.random() for _ in range(7)] for _ in range(7)]
    small, large = [0, 1, 2], [3, 4, 5, 6]
    best_s = min(
        max(edge_s[a][b] for a, b in zip(small, chosen, strict=True)) for chosen in itertools.permutations(large, 3)
    )
    assert bottleneck_matching_s(edge_s, small, large) == best_s
    swapped = [list(column) for column in zip(*edge_s, strict=True)]
    assert bottleneck_matching_s(swapped, large, small) == best_s


@pytest.mark.parametrize("sizes", [(3, 2, 2, 2, 2), (2, 2, 1, 2, 1)])
def test_tour_is_the_shortest_that_fits_the_sizes(sizes: tuple[int, ...]) -> None:
    rng = random.Random(1)
    apart_s = [[rng.random() for _ in sizes] for _ in sizes]
    orders = [
        (0, *rest)
        for rest in itertools.permutations(range(1, len(sizes)))
        if all(sizes[index] == size for index, size in zip(rest, sizes[1:], strict=True))
    ]
    length_s, order = shortest_tour(apart_s, sizes)
    assert order in orders
    assert length_s == pytest.approx(min(sum(apart_s[a][b] for a, b in itertools.pairwise(order)) for order in orders))


def test_many_stages_are_toured_greedily() -> None:
    apart_s = [[float(abs(a - b)) for b in range(20)] for a in range(20)]
    assert shortest_tour(apart_s, (2,) * 20) == (19.0, tuple(range(20)))


def test_breeding_improves_the_placement() -> None:
    problem = make_problem(5, [3, 2, 2, 2], 3, 12, fixed=False)
    few, many = (
        solve_paper_method(problem, seed=1, max_generations=number).predicted.iteration_s for number in (1, 200)
    )
    placement = genetic_placement(SlotModel(problem), Budget(0, 50), seed=1)
    assert sorted(placement) == list(range(9))
    assert many < few


def routes_by_force(costs: SlotCosts, origin: int) -> list[SlotRoute]:
    slot_model = costs.slot_model
    return [
        (origin, *slots)
        for sequence in stage_sequences(slot_model.problem.rules)
        for slots in itertools.product(*(slot_model.slots_of[stage] for stage in sequence[1:]))
    ]


@pytest.mark.parametrize("seed", range(4))
def test_a_path_is_the_cheapest_of_all(seed: int) -> None:
    problem = make_problem(seed, [2, 2, 2, 1, 2], 4, 6, swaps=1)
    costs = slot_costs(problem)
    path = PathFinder(costs, 1).find(Agent(1, 4, 1), Constraints())
    assert path is not None
    assert path.cost_s == pytest.approx(min(costs.chain(route).round_trip_s for route in routes_by_force(costs, 1)))
    chain = costs.chain(path.route)
    ends = [start_s + taken_s for start_s, taken_s in zip(path.starts, chain.durations_s, strict=True)]
    waits = [after - end - delay for after, end, delay in zip(path.starts[1:], ends, chain.delays_s, strict=False)]
    assert waits == pytest.approx([0.0] * len(waits))


def test_constraints_are_kept() -> None:
    problem = make_problem(0, [1, 2, 2, 2], 3, 6)
    costs = slot_costs(problem)
    finder, agent = PathFinder(costs, 1), Agent(0, 3, 1)
    free = finder.find(agent, Constraints())
    assert free is not None
    avoiding = finder.find(agent, Constraints(forbidden_slots=frozenset({free.route[1]})))
    assert avoiding is not None
    assert free.route[1] not in avoiding.route
    assert avoiding.cost_s >= free.cost_s
    kept = finder.find(agent, Constraints(stages=frozenset({1, 3})))
    assert kept is not None
    assert {costs.slot_model.stage_of[slot] for slot in kept.route} == {0, 1, 3}
    assert finder.find(agent, Constraints(forbidden_slots=frozenset(range(1, 7)))) is None


@pytest.mark.parametrize("named", [True, False])
def test_a_path_along_many_stages_that_it_has_to_visit_is_found_at_once(named: bool) -> None:
    """What would pass over two of them, with one swap to come back, is not followed."""
    problem = make_problem(0, [1] * 40, 30, 4, swaps=1)
    wanted = tuple(stage for stage in range(1, 40) if stage % 4)[:29]
    rules = problem.rules.model_copy(update={} if named else {"protected_stages": wanted})
    costs = slot_costs(problem.model_copy(update={"rules": rules}))
    path = PathFinder(costs, 1).find(Agent(0, 30, 1), Constraints(stages=frozenset(wanted) if named else None))
    assert path is not None
    assert {costs.slot_model.stage_of[slot] for slot in path.route} == {0, *wanted}


def test_an_agent_waits_out_its_windows() -> None:
    problem = make_problem(0, [1, 1, 1], 3, 2, swaps=0)
    costs = slot_costs(problem)
    finder, agent = PathFinder(costs, 1), Agent(0, 3, 1)
    free = finder.find(agent, Constraints())
    assert free is not None
    window = (1, free.starts[1] - 0.1, free.starts[1] + 2.0)
    late = finder.find(agent, Constraints(windows=frozenset({window})))
    assert late is not None
    assert late.starts[1] == window[2]
    assert late.cost_s == pytest.approx(free.cost_s + 2.0)


def test_agents_are_as_coarse_as_coverage_allows() -> None:
    problem = make_problem(0, [5, 3, 3, 3, 3, 3], 4, 30, memory=3)
    sets = groupings(SlotModel(problem), 0)
    assert [(len(agents), agents[0].size) for agents in sets] == [(5, 6), (10, 3), (15, 2), (30, 1)]
    odd = problem.model_copy(update={"rules": problem.rules.model_copy(update={"route_length": 3})})
    assert [agents[0].size for agents in groupings(SlotModel(odd), 0)] == [6, 3, 2, 1]
    few = make_problem(0, [2, 1, 1, 1], 3, 6, memory=3)
    assert [agents[0].size for agents in groupings(SlotModel(few), 0)] == [1]


def test_a_wave_gives_the_paper_s_caps() -> None:
    problem = make_problem(0, [5, 3, 3, 3, 3, 3], 4, 30, memory=3)
    costs = slot_costs(problem)
    wave = wave_of(costs, groupings(SlotModel(problem), 0)[0])
    assert (wave.stage_cap, wave.num_waves, set(wave.slot_caps)) == (18, 2, {6})


def sets_of(
    problem: Problem, agents: Sequence[Agent], steps: int = 4000
) -> tuple[SlotCosts, list[tuple[SlotRoute, ...]]]:
    costs = slot_costs(problem)
    return costs, list(path_sets(costs, agents, Budget(0, steps), seed=0))


def test_path_sets_cover_the_stages_and_fit_the_memory() -> None:
    problem = make_problem(0, [5, 3, 3, 3, 3, 3], 4, 30, memory=3)
    agents = groupings(SlotModel(problem), 0)[0]
    costs, found = sets_of(problem, agents)
    assert found
    for routes in found:
        assert [route[0] for route in routes] == [agent.origin for agent in agents]
        visits = [0] * 6
        for route in routes:
            for slot in route:
                visits[costs.slot_model.stage_of[slot]] += 6
        assert visits == [30, 18, 18, 18, 18, 18]
        assert max(sum(slot in route for route in routes) for slot in range(5, 20)) == 1


def test_single_microbatches_cover_to_one_where_visits_do_not_divide() -> None:
    problem = make_problem(0, [2, 1, 1, 1], 3, 5, memory=3)
    _, found = sets_of(problem, groupings(SlotModel(problem), 0)[-1])
    for routes in found:
        visits = [sum(slot in route for route in routes) for slot in (2, 3, 4)]
        assert max(visits) - min(visits) <= 1
    assert found


def slow_replicas() -> Problem:
    """Stage 1 has two slow replicas, equally far from the only origin."""
    problem = make_problem(0, [1, 2], 2, 2, memory=2, overhead_s=0.0)
    names = problem.nodes
    forward_s = {names[0]: 1.0, names[1]: 3.0, names[2]: 3.0}
    transfer_s = {a: {b: 0.5 for b in names if b != a} for a in names}
    update = {"forward_s": forward_s, "backward_s": forward_s, "transfer_s": transfer_s}
    return problem.model_copy(update={"costs": problem.costs.model_copy(update=update)})


def test_two_agents_at_a_node_at_the_same_time_are_parted() -> None:
    problem = slow_replicas()
    costs = SlotCosts(SlotModel(problem), (0, 1, 2))
    first, *later = path_sets(costs, (Agent(0, 2, 1), Agent(0, 2, 1)), Budget(0, 100), seed=0)
    assert first[0] == first[1]
    assert {route[1] for route in later[0]} == {1, 2}


def test_effort_finds_more_sets() -> None:
    problem = make_problem(0, [3, 2, 2, 2], 3, 6, memory=3)
    slot_model = SlotModel(problem)
    costs = slot_costs(problem)
    agents = groupings(slot_model, 0)[-1]
    once, twice = (len(list(path_sets(costs, agents, Budget(0, 1000), 0, effort))) for effort in (1, 2))
    assert once < twice


def test_the_plan_says_how_it_came_about() -> None:
    plan = solve_paper_method(make_problem(0, [1, 1, 1], 2, 4), seed=7, max_generations=5)
    assert (plan.solver.name, plan.solver.seed, plan.solver.wall_s) == ("SkipPipe paper's method", 7, 0.0)
