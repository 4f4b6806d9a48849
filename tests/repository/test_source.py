"""The source itself: types, lint, format, size of files, shipped configurations."""

import ast
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from skippipe.cli.commands.validate_command import validate_file

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "skippipe").rglob("*.py"), *(ROOT / "scheduler").rglob("*.py")])
HEAVY = {"torch", "transformers", "ortools", "plotly", "wandb", "datasets", "numpy"}


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join
)
def test_checker_is_content(command: list[str]) -> None:
    check(command)


def test_benchmarks_are_typed(tmp_path: Path) -> None:
    """Folders together whose files have different names, as few times as possible; a run.py gets that of its folder.

    What they share is followed from there.
    """
    groups: list[dict[str, Path]] = []
    for folder in sorted({path.parent for path in (ROOT / "benchmarks").glob("*/run.py")}):
        files = {path.name: path for path in folder.glob("*.py")}
        files[f"{folder.name}_run.py"] = files.pop("run.py")
        fitting = next((group for group in groups if not group.keys() & files), None)
        if fitting is None:
            groups.append(files)
        else:
            fitting |= files
    for number, group in enumerate(groups):
        place = tmp_path / str(number)
        place.mkdir()
        for name, path in group.items():
            (place / name).symlink_to(path)
        check(["mypy", *(str(place / name) for name in group)], {"MYPYPATH": str(place)})


def check(command: list[str], environment: Mapping[str, str] = MappingProxyType({})) -> None:
    result = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_command_modules_import_nothing_heavy_at_the_top() -> None:
    for path in [*(ROOT / "skippipe" / "cli").glob("*.py"), *(ROOT / "skippipe" / "cli" / "commands").glob("*.py")]:
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {
            name.split(".")[0]
            for node in top
            for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        }
        assert not names & HEAVY, f"{path.name} imports {names & HEAVY} before it is needed"


def test_no_file_is_too_long() -> None:
    assert {path.name: lines for path in SOURCES if (lines := len(path.read_text().splitlines())) > 700} == {}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configuration_is_valid(path: Path) -> None:
    assert validate_file(path) == {"clusters": "cluster", "experiments": "experiment"}[path.parent.name]


@pytest.mark.parametrize("name", ["full.yaml", "skippipe.yaml"])
def test_demo_experiment_is_valid(name: str) -> None:
    assert validate_file(ROOT / "skippipe" / "cli" / "demo" / name) == "experiment"


def test_ci_runs_the_test_command_of_the_readme() -> None:
    readme_lines = (ROOT / "README.md").read_text().splitlines()
    command = next(line for line in readme_lines if line.endswith("-m pytest"))
    assert command.replace("pip install ", "pip install -q ") in (ROOT / ".ci" / "run").read_text().splitlines()
