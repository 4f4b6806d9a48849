"""What a free placement needs for its gradient reductions: by hand, against all placements, and never above a plan."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from test_bounds import assert_no_bound_exceeds
from test_reduction import reducing

from skippipe_scheduler.bounds import explain_bound, lower_bounds
from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.slots.near_nodes import edges_s, growing_room, least_anywhere_s, room_within_s
from skippipe_scheduler.slots.slot_model import SlotModel
from skippipe_scheduler.solver.solve import SolveOptions, solve

REDUCTIONS = ("ring", "tree", "direct", "hierarchical")


def placements(problem: Problem) -> list[tuple[tuple[str, ...], ...]]:
    """Return the nodes of each stage in every placement and order of replicas."""
    ends = np.cumsum(problem.sizes)
    return [
        tuple(order[end - size : end] for size, end in zip(problem.sizes, ends, strict=True))
        for order in permutations(problem.nodes)
    ]


@settings(max_examples=24, derandomize=True)
@given(st.integers(0, 1000), st.sampled_from([(2, 2, 2), (3, 2, 1), (1, 3, 2)]), st.sampled_from(REDUCTIONS))
def test_no_placement_reduces_in_less_than_the_least(seed: int, sizes: tuple[int, ...], reduction: str) -> None:
    problem = reducing(seed, sizes, reduction)
    model = SlotModel(problem)
    found_s = np.array([problem.reduce_s(stages) for stages in placements(problem)])  # (placements, stages)
    assert (np.array(least_anywhere_s(model)) <= found_s.min(axis=0) * (1 + 1e-12)).all()
    gbit = min(problem.stage_bytes or ()) * 8e-9
    edge_s = np.minimum.reduce([edges_s(model, size, gbit) for size in sizes if size > 1])
    assert room_within_s(edge_s, sizes) <= found_s.max(axis=1).min() * (1 + 1e-12)


@settings(max_examples=40, derandomize=True)
@given(
    st.integers(0, 1000),
    st.sampled_from([(2, 2, 2), (3, 2, 3), (1, 4, 2)]),
    st.sampled_from(REDUCTIONS),
    st.sampled_from(["none", "link", "node", "shared"]),
)
def test_no_bound_exceeds_the_time_of_a_plan_that_reduces(
    seed: int, sizes: tuple[int, ...], reduction: str, contention: str
) -> None:
    problem = reducing(seed, sizes, reduction, contention=contention)
    plan = solve(problem, SolveOptions(seed=seed, max_evaluations=200))
    assert_no_bound_exceeds(lower_bounds(problem, 0.3), plan.predicted.iteration_s)


def two_sites(sizes: tuple[int, ...], reduction: str) -> Problem:
    """Return a problem in which the first half of the nodes are a slow link away from the rest."""
    problem = reducing(0, sizes, reduction, even=True)
    near = set(problem.nodes[: len(problem.nodes) // 2])
    gbit_per_s = {
        source: {sink: 8.0 if (source in near) == (sink in near) else 0.125 for sink in row}
        for source, row in (problem.costs.gbit_per_s or {}).items()
    }
    costs = problem.costs.model_copy(update={"gbit_per_s": gbit_per_s})
    return problem.model_copy(update={"costs": costs, "stage_bytes": (10**9,) * len(sizes)})


SLOW_S = {
    "ring": 2 * (0.5 + 4 / 0.125),
    "tree": 2 * (0.5 + 8 / 0.125),
    "direct": 2 * (0.5 + 4 / 0.125),
    "hierarchical": 2 * (0.5 + 4 / 0.125),
}
"""Two messages of 8 Gbit, or of their half, over 0.125 Gbit/s with 0.5 s of latency."""


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_stage_that_has_no_room_at_a_site_reduces_over_the_slow_link(reduction: str) -> None:
    """Six nodes: a pair at each site, and the one node that is left at each."""
    apart, together = two_sites((2, 2, 2), reduction), two_sites((3, 2, 1), reduction)
    slow, fast = lower_bounds(apart, 0.0), lower_bounds(together, 0.0)
    last_s = slow["reductions"] - SLOW_S[reduction]
    assert 0 < last_s < fast["reductions"] < 25 < SLOW_S[reduction]
    assert list(growing_room(edges_s(SlotModel(apart), 2, 8.0), (2, 2, 2)))[-1] == (SLOW_S[reduction], 3)
    assert "of the 3 stages with 2 or more replicas, only 2 have room" in explain_bound(apart, slow)


def test_only_a_free_placement_has_to_find_room() -> None:
    problem = two_sites((2, 2, 2), "ring")
    plan = solve(problem, SolveOptions(max_evaluations=100))
    assert "reductions" not in lower_bounds(problem.model_copy(update={"stage_bytes": None}), 0.0)
    fixed = problem.model_copy(update={"stage_sizes": None, "stages": plan.stages})
    assert "reductions" not in lower_bounds(fixed, 0.0)
    assert plan.predicted.iteration_s >= lower_bounds(problem, 0.0)["reductions"] > 65
