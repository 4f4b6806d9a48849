"""The programs in examples/ run as they stand."""

import subprocess
import sys
from pathlib import Path

import pytest

from skippipe_scheduler import load_plan

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], cwd=folder, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_plan_cluster(tmp_path: Path) -> None:
    output = run("plan_cluster.py", tmp_path, "out", "1")
    assert "of the full pipeline's" in output
    plan = load_plan(tmp_path / "out" / "plan.json")
    assert plan.visits == (12, 6, 6)
    assert "plotly" in (tmp_path / "out" / "plan.html").read_text()


@pytest.mark.slow
def test_train(tmp_path: Path) -> None:
    experiment = EXAMPLES.parent / "configs" / "experiments" / "tiny.yaml"
    output = run("train.py", tmp_path, str(experiment), "training.max_steps=3", "checkpoint.asynchronous=false")
    assert output.count("loss ") >= 2
    assert (tmp_path / "runs" / "tiny" / "checkpoints" / "step-00000003").is_dir()


@pytest.mark.slow
def test_own_policy(tmp_path: Path) -> None:
    experiment = EXAMPLES.parent / "configs" / "experiments" / "tiny.yaml"
    run("train.py", tmp_path, str(experiment), "training.max_steps=2", "checkpoint.asynchronous=false")
    rows = [line.split() for line in run("own_policy.py", tmp_path, "runs/tiny").splitlines()]
    assert [row[0] for row in rows] == ["no-middle"] * 3 + ["exit"] * 3
    assert rows[0][1:] == rows[3][1:], "at full depth both are the whole model"
    assert rows[2][1] == rows[5][1]
    assert rows[2][-1] != rows[5][-1]
