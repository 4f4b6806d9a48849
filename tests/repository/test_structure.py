"""The layout: imports, sizes of packages, and names that mean one thing each."""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "skippipe", ROOT / "scheduler" / "skippipe_scheduler")
SOURCES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
MOST_ENTRIES = 13
"""Modules and packages side by side in one package that a reader still takes in at a glance."""
SAME_MEANING = {"errors"}
"""Module names that stand in both packages for the same thing: one tree of exceptions."""


def test_imports_obey_the_contracts() -> None:
    """Layers, circles and what must not be imported: `[tool.importlinter]` in pyproject.toml."""
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command(['--no-cache'])",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_no_package_has_more_entries_than_a_reader_takes_in() -> None:
    crowded = {}
    for package in {path.parent for path in SOURCES}:
        entries = [path.stem for path in package.iterdir() if path.suffix == ".py" and not path.stem.startswith("__")]
        entries += [path.name for path in package.iterdir() if (path / "__init__.py").exists()]
        if len(entries) > MOST_ENTRIES:
            crowded[str(package.relative_to(ROOT))] = len(entries)
    assert crowded == {}


def test_every_package_says_what_happens_there() -> None:
    silent = [str(path) for path in SOURCES if path.name == "__init__.py" and not ast.get_docstring(_parsed(path))]
    assert silent == []


def test_a_module_name_means_one_thing() -> None:
    places = defaultdict(list)
    for path in SOURCES:
        if not path.stem.startswith("__"):
            places[path.stem].append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in places.items() if len(found) > 1 and name not in SAME_MEANING} == {}


def test_a_class_name_exists_once() -> None:
    places = defaultdict(list)
    for path in SOURCES:
        for name in _types(_parsed(path)):
            places[name].append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _types(module: ast.Module) -> Iterator[str]:
    """Yield the classes and the aliases of types at the top of a module; variables of types belong to no one."""
    for statement in module.body:
        if isinstance(statement, ast.ClassDef):
            yield statement.name
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name = statement.targets[0].id
            variable = isinstance(statement.value, ast.Call) and ast.unparse(statement.value.func) == "TypeVar"
            if name[0].isupper() and not name.isupper() and not variable:
                yield name
