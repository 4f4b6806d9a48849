"""Dividing layers and nodes over stages."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, strategies as st

from skippipe_scheduler.errors import InfeasibleError, ProblemError
from skippipe_scheduler.problem.workload import Workload, route_length, split_layers, stage_sizes

WORKLOAD = Workload(
    num_layers=8,
    layer_forward_flop=1e9,
    loss_flop=1e9,
    activation_bytes=1000,
    layer_gradient_bytes=1000,
    embedding_and_head_gradient_bytes=1000,
    layer_state_bytes=4000,
    embedding_and_head_state_bytes=4000,
    layer_resident_bytes=1000,
    embedding_and_head_resident_bytes=1000,
)


@given(st.integers(1, 40).flatmap(lambda stages: st.tuples(st.just(stages), st.integers(stages, 200))))
def test_layers_are_divided_evenly(case: tuple[int, int]) -> None:
    num_stages, num_layers = case
    layers = split_layers(num_layers, num_stages)
    assert len(layers) == num_stages
    assert sum(layers) == num_layers
    assert max(layers) - min(layers) <= 1
    assert layers[0] == min(layers)


def test_given_layers_are_kept() -> None:
    assert split_layers(8, 3, [4, 1, 3]) == (4, 1, 3)


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "given_layers", "message"),
    [
        (8, 12, None, "12 stages need at least 12 layers, the model has 8"),
        (8, 3, [4, 4], "layers_per_stage has 2 entries for 3 stages"),
        (8, 3, [4, 3, 2], "adds up to 9 layers, the model has 8"),
        (8, 3, [5, 0, 3], "stage 1 has 0 layers"),
        (8, 3, [10, -5, 3], "stage 1 has -5 layers"),
    ],
)
def test_layers_that_do_not_fit(num_layers: int, num_stages: int, given_layers: list[int] | None, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        split_layers(num_layers, num_stages, given_layers)


@pytest.mark.parametrize(
    ("num_nodes", "num_stages", "length", "sizes"),
    [
        (20, 6, 4, (5, 3, 3, 3, 3, 3)),  # published: 33% skip
        (18, 4, 3, (6, 4, 4, 4)),  # published: 25% skip
        (42, 8, 6, (7, 5, 5, 5, 5, 5, 5, 5)),  # published: 25% skip
        (12, 4, 4, (3, 3, 3, 3)),  # the full pipeline
        (7, 4, 3, (2, 2, 2, 1)),
        (4, 4, 2, (1, 1, 1, 1)),
    ],
)
def test_stage_sizes_of_known_cases(num_nodes: int, num_stages: int, length: int, sizes: tuple[int, ...]) -> None:
    assert stage_sizes(num_nodes, num_stages, length) == sizes


@given(st.integers(2, 16), st.data())
def test_stage_sizes_follow_the_skip_ratio(num_stages: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(2, num_stages))
    num_nodes = data.draw(st.integers(num_stages, 300))
    origins, *others = stage_sizes(num_nodes, num_stages, length)
    assert origins + sum(others) == num_nodes
    assert origins >= 1
    assert min(others) >= 1
    assert max(others) - min(others) <= 1
    if num_nodes >= 2 * num_stages:
        # n_0 : mean of the others is (S-1) : (P-1), but for rounding n_0 by at most a half.
        mean_at = [(num_nodes - n) / (num_stages - 1) for n in (origins - 0.5, origins + 0.5)]
        ratio = (num_stages - 1) / (length - 1)
        assert (origins - 0.5) / mean_at[0] <= ratio + 1e-9
        assert (origins + 0.5) / mean_at[1] >= ratio - 1e-9


@pytest.mark.parametrize(
    ("num_nodes", "num_stages", "length", "protected", "sizes"),
    [
        (20, 6, 4, (5,), (5, 3, 3, 2, 2, 5)),
        (12, 6, 3, (2, 5), (3, 1, 3, 1, 1, 3)),
        (12, 4, 4, (1, 2, 3), (3, 3, 3, 3)),
        (6, 6, 3, (5,), (1,) * 6),
        (7, 3, 3, (1, 2), (3, 2, 2)),
    ],
)
def test_a_stage_that_all_visit_has_as_many_replicas_as_origins(
    num_nodes: int, num_stages: int, length: int, protected: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    assert stage_sizes(num_nodes, num_stages, length, protected) == sizes


def test_too_few_nodes() -> None:
    with pytest.raises(InfeasibleError, match="6 stages need at least 6 nodes, the cluster has 4"):
        stage_sizes(4, 6, 3)


@pytest.mark.parametrize(
    ("num_stages", "skip_ratio", "length"),
    [
        (6, 0.33, 4),
        (4, 0.25, 3),
        (8, 0.25, 6),
        (6, 0.5, 3),
        (6, 0.0, 6),
        (5, 0.3, 4),
        (6, 0.25, 5),
        (2, 0.0, 2),
    ],
)
def test_route_length(num_stages: int, skip_ratio: float, length: int) -> None:
    assert route_length(num_stages, skip_ratio) == length


@given(st.integers(2, 64), st.floats(0, 1, exclude_max=True))
def test_the_largest_ratio_named_works(num_stages: int, skip_ratio: float) -> None:
    try:
        assert 2 <= route_length(num_stages, skip_ratio) <= num_stages
    except ProblemError as reason:
        largest = float(str(reason).rsplit(maxsplit=1)[-1])
        assert largest < skip_ratio
        assert route_length(num_stages, largest) == 2


@pytest.mark.parametrize(
    ("num_stages", "skip_ratio", "message"),
    [
        (4, 0.9, r"leaves 0 of 4 stages, .* works with 4 stages is 0\.62"),
        (4, 1.0, "skip_ratio is 1.0; it must be"),
        (4, -0.1, "skip_ratio is -0.1"),
        (4, float("nan"), "skip_ratio is nan"),
        (1, 0.0, "num_stages is 1"),
    ],
)
def test_ratios_that_do_not_work(num_stages: int, skip_ratio: float, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        route_length(num_stages, skip_ratio)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 0),
        ("layer_forward_flop", float("nan")),
        ("activation_bytes", 0),
        ("embedding_and_head_state_bytes", -1),
    ],
)
def test_a_workload_is_checked(field: str, value: Any) -> None:
    with pytest.raises(ProblemError, match=rf"workload\.{field} is {value}"):
        dataclasses.replace(WORKLOAD, **{field: value})
