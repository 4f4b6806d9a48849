"""The command line as a user first meets it."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from crowding import at_most_s

from skippipe.cli.main import COMMANDS


def skippipe(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "skippipe", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_help_answers_within_a_second() -> None:
    durations = []
    for _ in range(3):
        start_s = time.perf_counter()
        result = skippipe("--help")
        durations.append(time.perf_counter() - start_s)
        assert result.returncode == 0
        assert all(name in result.stdout for name in COMMANDS)
    assert min(durations) < 1.0


def test_python_does_not_look_through_all_objects_while_it_imports() -> None:
    """In the process of a command: a collection of the oldest objects takes up to 0.3 s, seven of them 1.3 s."""
    script = (
        "import gc; from skippipe.cli.main import main\n"
        "try: main(['plan', '--help'])\n"
        "except SystemExit: import skippipe.training.train_experiment; print(gc.get_stats()[2]['collections'])"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split()[-1] == "0"


def test_plan_of_six_nodes_comes_within_ten_seconds(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(
        "name: six\n"
        "nodes:\n"
        "  - {name: iowa, count: 3, region: Iowa, compute_tflop_per_s: 1, memory_gib: 80}\n"
        "  - {name: london, count: 3, region: London, compute_tflop_per_s: 1, memory_gib: 80}\n"
        "links:\n"
        "  within_region: {latency_ms: 1, gbit_per_s: 2}\n"
        "  between_regions:\n"
        "    - {regions: [Iowa, London], latency_ms: 40, gbit_per_s: 0.5}\n"
    )
    (tmp_path / "experiment.yaml").write_text(
        "cluster: cluster.yaml\n"
        "data: {source: python_stdlib}\n"
        "pipeline: {num_stages: 6, skip_ratio: 0.33}\n"
        "training: {num_microbatches: 8, sequence_length: 128}\n"
    )
    start_s = time.perf_counter()
    result = skippipe("plan", "--config", str(tmp_path / "experiment.yaml"), "--out", str(tmp_path / "plan.json"))
    duration_s = time.perf_counter() - start_s
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "plan.json").exists()
    assert duration_s < at_most_s(10)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help(name: str) -> None:
    result = skippipe(name, "--help")
    assert result.returncode == 0, result.stderr
    assert "Usage: skippipe" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "trian"),
        (["plan"], "--config"),
        (["plan", "--config", "none.yaml"], "none.yaml: no such file"),
        (["plan", "--problem", "none.json"], "none.json: no such file"),
        (["plan", "--problem", "none.json", "--time-limit", "nan"], "positive number of seconds"),
        (["simulate", "none.json"], "none.json: no such file"),
        (["validate", "none.txt"], ".yaml, .yml or .json"),
        (["train", "--config", "none.yaml"], "none.yaml: no such file"),
        (["evaluate", "no-such-run", "--keep", "1.0"], "no-such-run"),
        (["evaluate", "no-such-run", "--keep", "many"], "many"),
        (["report", "no-such-run"], "no-such-run"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(arguments: list[str], expected: str) -> None:
    result = skippipe(*arguments)
    assert result.returncode == 2
    assert expected in result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert result.stdout == ""


def test_a_package_that_is_not_there_is_named() -> None:
    program = "import sys; sys.modules['plotly'] = None; from skippipe.cli.main import main; main(['report', 'run'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == "skippipe: error: the Python package 'plotly' is not installed here; pip install plotly\n"
