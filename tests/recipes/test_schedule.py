"""Which plan a step runs, which plans that asks for, and what a recipe that does not fit says."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from training_runs import make_experiment

from skippipe.config.experiment_file import load_experiment, save_experiment
from skippipe.errors import ConfigError
from skippipe.runtime.plans.plan_schedule import PlanSchedule
from skippipe.runtime.plans.plan_specs import plan_specs_of

CURRICULUM = (
    {"share": 1, "skip_ratio": 0.0},
    {"share": 2, "skip_ratio": 0.33},
    {"share": 1, "route_lengths": {3: 1, 2: 3}, "max_swaps": 1},
)


def course(folder: Path, recipe: dict[str, Any], max_steps: int = 40) -> list[str]:
    """Return the plan of every step."""
    schedule = PlanSchedule.of(make_experiment(folder, recipe=recipe, training={"max_steps": max_steps}))
    return [schedule.plan_of(step) for step in range(1, max_steps + 1)]


def test_without_a_recipe_every_step_runs_the_main_plan(tmp_path: Path) -> None:
    assert course(tmp_path, {}) == ["main"] * 40
    assert plan_specs_of(make_experiment(tmp_path)) == {}


def test_every_kth_step_has_full_depth(tmp_path: Path) -> None:
    plans = course(tmp_path, {"full_depth_interval": 10})
    assert [step for step, plan in enumerate(plans, start=1) if plan == "full-depth"] == [10, 20, 30, 40]
    (wanted,) = plan_specs_of(make_experiment(tmp_path, recipe={"full_depth_interval": 10})).values()
    assert (wanted.rules.lengths, wanted.rules.max_swaps) == ((3,), 0)


def test_curriculum_divides_the_steps_by_share(tmp_path: Path) -> None:
    recipe = {"depth_curriculum": CURRICULUM}
    assert course(tmp_path, recipe) == ["phase-1"] * 10 + ["main"] * 20 + ["phase-3"] * 10
    assert course(tmp_path, recipe, max_steps=7) == ["phase-1"] * 2 + ["main"] * 3 + ["phase-3"] * 2
    assert course(tmp_path, recipe, max_steps=1) == ["main"]
    wanted = plan_specs_of(make_experiment(tmp_path, recipe=recipe))
    assert {name: (spec.rules.lengths, spec.rules.max_swaps) for name, spec in wanted.items()} == {
        "phase-1": ((3,), 0),
        "phase-3": ((2, 3), 1),
    }


def test_routes_are_drawn_evenly_and_from_the_seed(tmp_path: Path) -> None:
    recipe = {"redrawn_routes": 4}
    plans = course(tmp_path, recipe, max_steps=4000)
    counts = Counter(plans)
    assert set(counts) == {"main", "main-draw-2", "main-draw-3", "main-draw-4"}
    assert all(900 < count < 1100 for count in counts.values())
    assert course(tmp_path, recipe, max_steps=4000) == plans
    other = PlanSchedule.of(make_experiment(tmp_path, recipe=recipe, seed=4))
    assert [other.plan_of(step) for step in range(1, 41)] != plans[:40]
    wanted = plan_specs_of(make_experiment(tmp_path, recipe=recipe))
    assert [(name, spec.seed) for name, spec in wanted.items()] == [
        ("main-draw-2", 1000),
        ("main-draw-3", 2000),
        ("main-draw-4", 3000),
    ]


def test_recipes_go_together(tmp_path: Path) -> None:
    recipe = {"full_depth_interval": 5, "redrawn_routes": 2, "depth_curriculum": CURRICULUM[1:]}
    plans = course(tmp_path, recipe, max_steps=60)
    assert {plans[step - 1] for step in range(5, 61, 5)} == {"full-depth"}
    assert set(plans[:40]) == {"main", "main-draw-2", "full-depth"}
    assert set(plans[40:]) == {"phase-2", "phase-2-draw-2", "full-depth"}
    assert set(plan_specs_of(make_experiment(tmp_path, recipe=recipe))) == set(plans) - {"main"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"recipe": {"full_depth_interval": 1}}, "greater than or equal to 2"),
        (
            {"recipe": {"full_depth_interval": 10}, "pipeline": {"skip_ratio": 0}},
            "every step has full depth already; leave one of the two out",
        ),
        ({"recipe": {"redrawn_routes": 0}}, "greater than or equal to 1"),
        ({"recipe": {"depth_curriculum": [{"share": 1}]}}, "either skip_ratio or route_lengths"),
        ({"recipe": {"depth_curriculum": [{"share": 0, "skip_ratio": 0}]}}, "greater than 0"),
        ({"recipe": {"layer_dropout": {"probability": 1.0}}}, "less than 1"),
        (
            {"recipe": {"ffn_dropout": {"probability": 0.1}}, "training": {"compile": True}},
            r"training\.compile and recipe\.ffn_dropout exclude each other",
        ),
        (
            {"recipe": {"layer_dropout": {"probability": 0.1}}, "training": {"compile": True}},
            "use unit: microbatch, or turn compile off",
        ),
    ],
)
def test_recipes_that_do_not_fit_are_refused(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_experiment(tmp_path, **sections)


def test_mistakes_in_a_file_are_one_line(tmp_path: Path) -> None:
    save_experiment(make_experiment(tmp_path), tmp_path / "experiment.yaml")
    with pytest.raises(ConfigError) as caught:
        load_experiment(tmp_path / "experiment.yaml", ["recipe.full_depth_intervall=10"])
    assert "did you mean 'recipe.full_depth_interval'" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load_experiment(tmp_path / "experiment.yaml", ["recipe.layer_dropout.over_depth=quadratic"])
    assert "\n" not in str(caught.value)
    assert "recipe.layer_dropout.over_depth" in str(caught.value)
