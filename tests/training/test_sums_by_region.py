"""A run whose replicas lie in several regions sums their gradients by region, to the same losses."""

from pathlib import Path

import pytest
from training_runs import losses, make_experiment, ranks_plan, train_alone, train_on_ranks

from skippipe.runtime.ranks.groups import by_region

BY_REGION = {"reduction": "hierarchical"}


@pytest.mark.slow
def test_losses_are_those_of_one_process(tmp_path: Path) -> None:
    plan = ranks_plan()
    apart = plan.model_copy(update={"regions": tuple(f"region {rank}" for rank in range(len(plan.nodes)))})
    train_on_ranks(make_experiment(tmp_path, "ranks", pipeline=BY_REGION), apart)
    train_alone(make_experiment(tmp_path, "alone"), plan)
    assert losses(tmp_path / "ranks") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)


def test_replicas_are_grouped_in_the_order_of_the_stage() -> None:
    plan = ranks_plan()
    first, second, third = plan.nodes
    ranks = [plan.rank_of[node] for node in (first, second, third)]
    near = plan.model_copy(update={"regions": ("Oregon", "Iowa", "Oregon")})
    assert by_region(near, (second, third, first), ranks) == ((1,), (2, 0))
    assert by_region(plan.model_copy(update={"regions": None}), plan.nodes, ranks) == ((0, 1, 2),)
