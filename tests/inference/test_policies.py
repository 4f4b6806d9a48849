"""Which stages a policy keeps."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skippipe.errors import InputError
from skippipe.inference.policies import build_policy, kept_stages


@given(num_stages=st.integers(2, 12), data=st.data(), draw=st.integers(0, 100), seed=st.integers(0, 5))
def test_random_stages_are_a_sorted_subset_with_stage_zero(
    num_stages: int, data: st.DataObject, draw: int, seed: int
) -> None:
    kept = data.draw(st.integers(1, num_stages))
    stages = build_policy("random", seed).stages(num_stages, kept, draw)
    assert len(stages) == len(set(stages)) == kept
    assert stages[0] == 0
    assert list(stages) == sorted(stages)
    assert max(stages) < num_stages
    assert stages == build_policy("random", seed).stages(num_stages, kept, draw)


def test_random_choices_are_uniform_over_the_other_stages() -> None:
    policy = build_policy("random", 0)
    counts = Counter(stage for draw in range(3000) for stage in policy.stages(6, 3, draw)[1:])
    assert set(counts) == {1, 2, 3, 4, 5}
    assert all(abs(count - 1200) < 120 for count in counts.values())


def test_full_depth_runs_everything() -> None:
    assert build_policy("full", 0).stages(5, 2, 0) == (0, 1, 2, 3, 4)


def test_everything_kept_is_full_depth() -> None:
    assert build_policy("random", 3).stages(6, kept_stages(1.0, 6), 9) == tuple(range(6))


@pytest.mark.parametrize(("keep", "stages"), [(1.0, 6), (0.67, 4), (0.5, 3), (0.2, 1)])
def test_share_of_depth_in_stages(keep: float, stages: int) -> None:
    assert kept_stages(keep, 6) == stages


@pytest.mark.parametrize("keep", [0.0, -1.0, 1.5, float("nan"), 0.05])
def test_impossible_shares_are_refused(keep: float) -> None:
    with pytest.raises(InputError, match="--keep"):
        kept_stages(keep, 6)


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(InputError, match="'best'"):
        build_policy("best", 0)
