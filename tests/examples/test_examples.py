"""The programs in examples/ run as they stand."""

import re
from pathlib import Path

import pytest
from processes import ForkedProcess, preloaded, run_program

from skippipe_scheduler import load_plan

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, folder: Path, *arguments: str) -> str:
    output = folder / f"{name}.txt"
    process = preloaded().Process(target=run_program, args=(EXAMPLES / name, list(arguments), output, folder))
    process.start()
    code, printed = ForkedProcess(process, output).finish()
    assert code == 0, printed
    return printed


@pytest.mark.slow
def test_plan_cluster(tmp_path: Path) -> None:
    output = run("plan_cluster.py", tmp_path, "out", "1")
    assert "of the full pipeline's" in output
    plan = load_plan(tmp_path / "out" / "plan.json")
    assert plan.visits == (12, 6, 6)
    assert "plotly" in (tmp_path / "out" / "plan.html").read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run of three steps, and what the training printed."""
    folder = tmp_path_factory.mktemp("trained")
    experiment = EXAMPLES.parent / "configs" / "experiments" / "tiny.yaml"
    return folder, run("train.py", folder, str(experiment), "training.max_steps=3", "checkpoint.asynchronous=false")


@pytest.mark.slow
def test_train(trained: tuple[Path, str]) -> None:
    folder, output = trained
    assert re.findall(r"step (\d+): loss [\d.]+, [\d.]+ s", output) == ["1", "3"]
    assert (folder / "runs" / "tiny" / "checkpoints" / "step-00000003").is_dir()


@pytest.mark.slow
def test_generate_half_depth(trained: tuple[Path, str]) -> None:
    output = run("generate_half_depth.py", trained[0], "runs/tiny", "import ")
    assert re.findall(r"(\d) layers, (\d+)% of the FLOP: [\d.]+", output) == [("6", "100"), ("4", "67"), ("3", "50")]
    assert re.findall(r"at (\d+)% of the depth: import ", output) == ["100", "50"]


@pytest.mark.slow
def test_own_policy(trained: tuple[Path, str]) -> None:
    rows = [line.split() for line in run("own_policy.py", trained[0], "runs/tiny").splitlines()]
    assert [row[0] for row in rows] == ["no-middle"] * 3 + ["exit"] * 3
    assert rows[0][1:] == rows[3][1:], "at full depth both are the whole model"
    assert rows[2][1] == rows[5][1]
    assert rows[2][-1] != rows[5][-1]
