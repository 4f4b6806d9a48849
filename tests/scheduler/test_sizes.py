"""Stage sizes between equal work and equal memory."""

import pytest
from hypothesis import given, settings, strategies as st
from small_problems import make_problem

from skippipe_scheduler.errors import InfeasibleError
from skippipe_scheduler.options import SolveOptions
from skippipe_scheduler.problem.problem import EvenMicrobatches
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.problem.stage_sizes import least_sizes, size_choices, size_variants, with_room_for_pins
from skippipe_scheduler.problem.workload import stage_sizes
from skippipe_scheduler.solver.solve import solve, solve_variants


@pytest.mark.parametrize(
    ("num_nodes", "rules", "choices"),
    [
        (
            20,
            Rules(num_stages=6, route_length=4),
            [(5, 3, 3, 3, 3, 3), (6, 3, 3, 3, 3, 2), (7, 3, 3, 3, 2, 2), (8, 4, 3, 2, 2, 1)],
        ),
        (10, Rules(num_stages=4, route_length=4), [(3, 3, 2, 2), (3, 3, 2, 2), (4, 3, 2, 1)]),
        (6, Rules(num_stages=6, route_length=4), [(1,) * 6]),
        (
            20,
            Rules(num_stages=6, route_length=4, protected_stages=(5,)),
            [(5, 3, 3, 2, 2, 5), (6, 3, 3, 2, 2, 4), (7, 3, 3, 2, 2, 3), (8, 3, 3, 2, 2, 2)],
        ),
    ],
)
def test_choices_of_known_cases(num_nodes: int, rules: Rules, choices: list[tuple[int, ...]]) -> None:
    assert size_choices(num_nodes, rules) == list(dict.fromkeys(choices))


@settings(max_examples=100)
@given(st.integers(2, 12), st.data())
def test_choices_use_every_node_and_give_early_stages_more_and_more(num_stages: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(2, num_stages), min_size=1, max_size=3, unique=True))
    rules = Rules(num_stages=num_stages, route_length=max(lengths), route_lengths=dict.fromkeys(lengths, 1))
    num_nodes = data.draw(st.integers(num_stages, 100))
    choices = size_choices(num_nodes, rules)
    mean_length = sum(lengths) / len(lengths)
    assert choices[0] == stage_sizes(num_nodes, num_stages, mean_length)
    assert len(set(choices)) == len(choices)
    for sizes in choices:
        assert sum(sizes) == num_nodes
        assert min(sizes) >= 1
    origins = [sizes[0] for sizes in choices[1:]]
    assert origins == sorted(origins)
    assert list(choices[-1][1:]) == sorted(choices[-1][1:], reverse=True)
    assert least_sizes(choices) == tuple(map(min, zip(*choices, strict=True)))


@pytest.mark.parametrize(
    ("pinned", "sizes"),
    [
        ({}, (3, 2, 1)),
        ({"a": 2, "b": 2}, (2, 2, 2)),
        ({"a": 2, "b": 2, "c": 2, "d": 1}, (2, 1, 3)),
        ({"a": 2, "b": 2, "c": 2, "d": 2}, (1, 1, 4)),
        (dict.fromkeys("abcde", 2), (3, 2, 1)),
    ],
)
def test_sizes_that_nobody_gives_have_room_for_pins(pinned: dict[str, int], sizes: tuple[int, ...]) -> None:
    assert with_room_for_pins((3, 2, 1), pinned) == sizes


def test_too_few_nodes() -> None:
    with pytest.raises(InfeasibleError, match="6 stages need at least 6 nodes, the cluster has 4"):
        size_choices(4, Rules(num_stages=6, route_length=3))


def test_variants_keep_pins_and_the_number_of_microbatches() -> None:
    problem = make_problem(1, [5, 3, 3, 3, 3, 3], 4, 30, fixed=False)
    per_origin = problem.model_copy(update={"microbatches_per_origin": 6})
    assert [variant.sizes[0] for variant in size_variants(per_origin)] == [5, 6, 7, 8]
    assert {variant.num_microbatches for variant in size_variants(per_origin)} == {30}
    assert size_variants(per_origin)[1].microbatches_per_origin == EvenMicrobatches(even=30)
    last = dict.fromkeys(problem.nodes[:3], 5)
    assert [variant.sizes for variant in size_variants(problem.model_copy(update={"pinned": last}))] == [problem.sizes]
    fixed = make_problem(1, [5, 3, 3, 3, 3, 3], 4, 30)
    assert size_variants(fixed) == [fixed]


def test_more_origins_shorten_a_plan_that_memory_limits() -> None:
    problem = make_problem(2, [3, 3, 3, 3], 3, 24, fixed=False, memory=1)
    options = SolveOptions(max_evaluations=20_000)
    by_work, chosen = solve(problem, options), solve_variants(size_variants(problem), options)
    assert chosen.predicted.iteration_s < 0.97 * by_work.predicted.iteration_s
    assert len(chosen.stages[0].nodes) > 3
