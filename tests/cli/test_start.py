"""The command line as a user first meets it."""

import subprocess
import sys
import time

import pytest

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
