"""The source itself: types, lint, format, direction of imports, size of files, shipped configurations."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from skippipe.cli.commands.validate_command import validate_file

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "skippipe").rglob("*.py"), *(ROOT / "scheduler").rglob("*.py")])
LAYERS = {
    "skippipe_scheduler": 0,
    "errors": 1,
    "config": 1,
    "plans": 2,
    "data": 2,
    "model": 3,
    "runtime": 4,
    "planning": 5,
    "checkpoint": 6,
    "cluster": 6,
    "monitor": 6,
    "training": 7,
    "inference": 7,
    "cli": 8,
}
HEAVY = {"torch", "transformers", "ortools", "plotly", "wandb", "datasets", "numpy"}


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join
)
def test_checker_is_content(command: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=170, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def layer_of(module: str) -> int | None:
    parts = module.split(".")
    if parts[0] == "skippipe_scheduler":
        return 0
    if parts[0] == "skippipe" and len(parts) > 1:
        return LAYERS.get(parts[1])
    return None


def imported_modules(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return names + [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]


def test_imports_go_one_way() -> None:
    offences = []
    for path in SOURCES:
        root = ROOT / "scheduler" if "scheduler" in path.relative_to(ROOT).parts[:1] else ROOT
        own = layer_of(".".join(path.relative_to(root).with_suffix("").parts))
        for module in imported_modules(path):
            other = layer_of(module)
            allowed = own is None or other is None or other <= own
            if not allowed or (own == 0 and module.split(".")[0] in {"torch", "skippipe"}):
                offences.append(f"{path.relative_to(ROOT)} imports {module}")
    assert offences == []


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
