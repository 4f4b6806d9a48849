"""Placements to begin from."""

from hypothesis import given, settings, strategies as st
from small_problems import make_problem

from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.slots.placement import regional_placement
from skippipe_scheduler.slots.slot_model import SlotModel


def placed(problem: Problem) -> list[list[str]]:
    """Return the nodes of each stage."""
    slot_model = SlotModel(problem)
    return [[*nodes] for nodes in slot_model.stages(regional_placement(slot_model))]


def with_nodes(problem: Problem, backward_s: dict[str, float], memory: dict[str, int]) -> Problem:
    costs = problem.costs.model_copy(update={"backward_s": backward_s, "memory": memory})
    return problem.model_copy(update={"costs": costs})


def test_of_equal_memory_origins_are_the_fastest_and_other_stages_get_fast_and_slow_ones_alike() -> None:
    problem = make_problem(0, [3, 3, 3], 2, 6, fixed=False)
    backward_s = {name: 1.0 + index for index, name in enumerate(problem.nodes)}
    stages = placed(with_nodes(problem, backward_s, dict.fromkeys(problem.nodes, 4)))
    assert [sorted(int(backward_s[name]) for name in nodes) for nodes in stages] == [[1, 2, 3], [4, 6, 8], [5, 7, 9]]


def test_nodes_with_more_memory_hold_earlier_stages() -> None:
    problem = make_problem(0, [2, 2, 2], 2, 6, fixed=False)
    memory = {name: 1 + index // 2 for index, name in enumerate(problem.nodes)}
    stages = placed(with_nodes(problem, problem.costs.backward_s, memory))
    assert [{memory[name] for name in nodes} for nodes in stages] == [{3}, {2}, {1}]


@settings(max_examples=50, derandomize=True)
@given(st.data(), st.lists(st.integers(1, 4), min_size=2, max_size=5))
def test_every_node_has_one_place_whatever_regions_and_memory_are(data: st.DataObject, sizes: list[int]) -> None:
    problem = make_problem(1, sizes, 2, max(4, sizes[0]), fixed=False)
    memory = {name: data.draw(st.integers(1, 3)) for name in problem.nodes}
    regions = tuple(data.draw(st.sampled_from("abc")) for _ in problem.nodes)
    problem = with_nodes(problem, problem.costs.backward_s, memory).model_copy(update={"regions": regions})
    stages = placed(problem)
    assert [len(nodes) for nodes in stages] == sizes
    assert sorted(name for nodes in stages for name in nodes) == sorted(problem.nodes)
