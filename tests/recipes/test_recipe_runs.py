"""Runs by recipe: ranks have the losses of one process, and a run that was stopped those of one that was not."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from random_plans import random_plan
from training_runs import ALONE, losses, make_experiment, small_plan, train_alone, train_on_ranks

from skippipe.checkpoint.reader import complete_checkpoints, read_metadata
from skippipe.config.experiment import Experiment
from skippipe.errors import InfeasibleError, PlanError, ProblemError
from skippipe.monitor.metrics_file import read_metrics
from skippipe.planning.recipe_plans import warn_of_draws
from skippipe.planning.sharing import choose_plans
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.training.loop import train
from skippipe_scheduler.solver.other_routes import other_routes_problem, route_distance

NUM_RANKS = 4
STEPS = 8
RECIPE: dict[str, Any] = {
    "full_depth_interval": 4,
    "redrawn_routes": 2,
    "depth_curriculum": [{"share": 1, "route_lengths": {3: 1, 2: 1}}, {"share": 1, "skip_ratio": 0.33}],
    "rescale_stages": True,
    "layer_dropout": {"probability": 0.5, "over_depth": "linear", "over_steps": "falling", "rescale": True},
    "ffn_dropout": {"probability": 0.3, "unit": "microbatch"},
    "early_exit_loss": 0.2,
}


def by_recipe(folder: Path, name: str, **sections: Any) -> Experiment:
    training = {"max_steps": STEPS, "gradient_normalization": "visits"}
    given = {"recipe": RECIPE, "training": training, "checkpoint": {"interval": 4}} | sections
    return make_experiment(folder, name, **given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on several ranks, whose plans rank 0 has solved."""
    path = tmp_path_factory.mktemp("recipes")
    train_on_ranks(by_recipe(path, "ranks"), None, world_size=NUM_RANKS)
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The same run in one process, along the same plans."""
    experiment = by_recipe(folder, "alone")
    shutil.copytree(folder / "ranks" / "plans", folder / "alone" / "plans")
    shutil.copy(folder / "ranks" / "plan.json", folder / "alone")
    train(experiment, choose_plans(experiment, None), ALONE)
    return folder / "alone"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ranks_have_the_losses_of_one_process(folder: Path, alone: Path) -> None:
    plans = choose_plans(by_recipe(folder, "alone"), None)
    assert losses(folder / "ranks") == pytest.approx(losses(alone), abs=1e-5)
    entries = [read_metrics(folder / name / "metrics.jsonl") for name in ("ranks", "alone")]
    for ranks, process in zip(*entries, strict=True):
        assert ranks["train/early_exit_loss"] == pytest.approx(process["train/early_exit_loss"], abs=1e-5)
        assert ranks["val/loss"] == pytest.approx(process["val/loss"], abs=1e-5) if "val/loss" in process else True
        assert ranks["pipeline/plan"] == process["pipeline/plan"]
        assert ranks["pipeline/predicted_s"] == plans[ranks["pipeline/plan"]].predicted.iteration_s
    assert [entry["pipeline/plan"] for entry in entries[0]][3::4] == ["full-depth"] * 2
    metadata = read_metadata(complete_checkpoints(folder / "ranks")[-1])
    assert metadata.plan_hash == plans.hash != plans.main.hash


def test_protected_stages_are_on_every_route_of_every_plan(tmp_path: Path) -> None:
    pipeline = {"protected_stages": [2], "planner": {"max_evaluations": 30}}
    experiment = by_recipe(tmp_path, "protected", pipeline=pipeline)
    plans = choose_plans(experiment, None)
    assert len(plans) > 3
    for name, plan in plans.items():
        assert plan.visits[0] == plan.visits[2] == len(plan.microbatches)
        assert name == "full-depth" or plan.visits[1] < len(plan.microbatches)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_stopped_run_continues_bitwise_with_the_plans_that_it_has(folder: Path, alone: Path) -> None:
    shutil.copytree(alone, folder / "parts")
    shutil.rmtree(folder / "parts" / "checkpoints" / f"step-{STEPS:08d}")
    kept = {path.name: path.read_bytes() for path in (folder / "parts" / "plans").iterdir()}
    assert len(kept) == 4  # full depth, a phase, and a second draw of both phases
    experiment = by_recipe(folder, "parts")
    summary = train(experiment, choose_plans(experiment, None), ALONE)
    assert (summary.first_step, summary.step) == (4, STEPS)
    assert losses(folder / "parts") == losses(alone)
    assert {path.name: path.read_bytes() for path in (folder / "parts" / "plans").iterdir()} == kept


def test_plans_are_kept_until_something_else_is_wanted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    experiment = by_recipe(tmp_path, "run")
    plans = choose_plans(experiment, None)
    assert choose_plans(experiment, None) == plans
    assert "made for other" not in caplog.text
    stages = [[stage.nodes for stage in plan.stages] for _, plan in plans.items()]
    assert all(stage == stages[0] for stage in stages)
    assert plans["full-depth"].visits == (4, 4, 4)
    assert all(plan.costs == plans.main.costs for _, plan in plans.items())
    other = by_recipe(
        tmp_path, "run", recipe=RECIPE | {"depth_curriculum": [{"share": 1, "route_lengths": {3: 3, 2: 1}}]}
    )
    changed = choose_plans(other, None)
    assert "phase-1.json: made for other rules than this run's" in caplog.text
    assert changed["phase-1"].rules.route_lengths == {3: 3, 2: 1}
    assert changed["full-depth"] == plans["full-depth"]


def test_given_plan_gets_the_further_ones_on_its_placement(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path, recipe={"full_depth_interval": 2}, training={"max_steps": 2})
    small_plan().save(tmp_path / "given.json")
    plans = choose_plans(experiment, tmp_path / "given.json")
    assert plans.main == small_plan()
    assert plans["full-depth"].stages == small_plan().stages
    assert train(experiment, plans, ALONE).step == 2
    with pytest.raises(PlanError, match="the recipe needs the plan 'full-depth', the run has 'main'"):
        train_alone(experiment)
    two_stages = make_experiment(tmp_path, recipe={"full_depth_interval": 2}, pipeline={"num_stages": 2})
    with pytest.raises(PlanError, match=r"has 3 stages, pipeline\.num_stages is 2; make them equal"):
        choose_plans(two_stages, tmp_path / "given.json")


def test_phase_without_a_plan_names_itself_and_the_rules(tmp_path: Path) -> None:
    curriculum = [{"share": 1, "skip_ratio": 0.33}, {"share": 1, "skip_ratio": 0.5}]
    pipeline = {"num_stages": 6, "skip_ratio": 0, "max_forward_jump": 1}
    experiment = make_experiment(tmp_path, recipe={"depth_curriculum": curriculum}, pipeline=pipeline)
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(cluster.read_text().replace("count: 4", "count: 6"))
    with pytest.raises(InfeasibleError, match=r"the recipe's plan 'phase-1': .*max_forward_jump"):
        choose_plans(experiment, None)


def test_draws_that_are_slow_or_the_same_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    main = small_plan()
    other = random_plan(6, route_length=2, num_microbatches=4, beside=main).model_copy(update={"rules": main.rules})
    assert route_distance(main, other) > 0
    slow_s = 2 * max(main.predicted.iteration_s, other.predicted.iteration_s)
    slow = other.model_copy(update={"predicted": other.predicted.model_copy(update={"iteration_s": slow_s})})
    warn_of_draws(PlanSet(main, {"main-draw-2": slow, "main-draw-3": main}))
    assert "plan main-draw-2 takes" in caplog.text
    assert "plans main and main-draw-3 have the same routes; redraw fewer" in caplog.text
    assert len(caplog.records) == 2


def test_rules_for_other_stages_are_refused() -> None:
    rules = small_plan().rules.model_copy(update={"num_stages": 4})
    with pytest.raises(ProblemError, match="the plan has 3 stages, the rules are for 4"):
        other_routes_problem(small_plan(), rules)
