"""The benchmark of skip tolerance: a quick run is complete, found again, and says what each recipe costs."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from skippipe.planning.sharing import choose_plans
from skippipe.runtime.plans.plan_set import PlanSet

FOLDER = Path(__file__).parents[2] / "benchmarks" / "skip_tolerance"


@pytest.fixture
def one_training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("one_training")


@pytest.mark.extended
def test_quick_run_is_evaluated_at_every_depth_and_kept(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "run.py"), "--quick", "--only", "skip, full depth", "--seed", "0"]
    command += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=170)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(result["perplexity"]) == ["12", "10", "8", "6", "4"]
    assert "skip, full depth every 10th" in (tmp_path / "out" / "results-2.4M.svg").read_text()
    for found in result["perplexity"].values():
        assert 200 < found["best"] <= found["mean"] < 300  # of 257 tokens, after 4 steps
    (folder,) = (tmp_path / "work").iterdir()
    assert (folder / "plans" / "full-depth.json").exists()
    written = (folder / "result.json").stat().st_mtime_ns
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=170)
    assert again.stdout == done.stdout
    assert "skip, full depth every 10th | 4 | 0.67 |" in done.stdout
    assert (folder / "result.json").stat().st_mtime_ns == written


def test_a_figure_shows_every_recipe_and_is_the_same_again(one_training: ModuleType, tmp_path: Path) -> None:
    page = importlib.import_module("page")
    results = [
        {"recipe": name, "seed": seed, "perplexity": {"12": {"mean": 4.0 + seed}, "6": {"mean": 8.0}}}
        for name, seed in (("skip", 0), ("normal", 0), ("normal", 1))
    ]
    figures = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        page.draw(tmp_path / name / "results.svg", results, ["normal", "skip", "mixed 6 4 3 3"])
        figures.append((tmp_path / name / "results.svg").read_text())
    assert figures[0] == figures[1]
    assert [label in figures[0] for label in (">normal<", ">skip<", ">mixed")] == [True, True, False]


def test_learning_rates_of_normal_training_are_compared_under_the_same_seeds(one_training: ModuleType) -> None:
    """The second rate is worse where both were run; the first one's other seed has harder data."""
    page = importlib.import_module("page")

    def results(*perplexities: float) -> list[dict[str, object]]:
        return [{"seed": seed, "perplexity": {"6": {"mean": mean}}} for seed, mean in enumerate(perplexities)]

    assert page._ratio(results(3.0, 8.0), [results(4.0, 8.0), results(5.0)], "6") == "0.875 ± 0.177"
    assert page._ratio(results(3.0), [results(4.0, 8.0), results(3.0)], "6") == "1.000"
    assert page._ratio(results(3.0), [], "6") == ""


def test_compute_of_a_recipe_is_relative_to_normal_training(one_training: ModuleType, tmp_path: Path) -> None:
    setups = importlib.import_module("setups")
    plans: dict[str, PlanSet] = {}

    def share(name: str) -> float:
        experiment = setups.experiment_of(name, "2.4M", 0, tmp_path / name, quick=True)
        plans[name] = choose_plans(experiment, None)
        size = importlib.import_module("sizes").SIZES["2.4M"]
        steps = int(size.steps * setups.SETUPS[name].length)
        training = experiment.training.model_copy(update={"max_steps": steps})
        whole = experiment.model_copy(update={"training": training})
        return float(one_training.compute_share(whole, plans[name], size))

    assert share("skip, full depth every 10th") == pytest.approx(0.7)
    assert share("curriculum, deep to shallow") == pytest.approx(2 / 3, abs=1e-3)
    assert share("layer dropout, LayerSkip") == pytest.approx(2 / 3, abs=0.02)
    assert share("skip, as much compute as normal") == 1
    assert plans["skip, as much compute as normal"].main.visits == (20, 12, 12, 12, 12, 12)
