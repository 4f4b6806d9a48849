"""Every public name has an example in its docstring, and all of them run as the documentation shows them.

An example may use the names of its package, `Path`, `torch`, and what the examples listed in `MAKERS` have made.
"""

import doctest
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import griffe
import pytest
import torch

import skippipe
import skippipe_scheduler
from skippipe.inference.policies import registry

ROOT = Path(__file__).parents[2]
MAKERS = {
    "skippipe": ("load_experiment", "train_experiment", "load_model"),
    "skippipe_scheduler": ("Cluster", "Workload", "build_problem", "solve", "simulate"),
}
"""The examples that run first, in this order; the others of the package find what they have made."""
PACKAGES = [pytest.param(package, id=package.__name__) for package in (skippipe, skippipe_scheduler)]


def public_names(package: ModuleType) -> dict[str, Any]:
    """Return the public objects but for errors, the makers first."""
    makers = MAKERS[package.__name__]
    names = [*makers, *(name for name in package.__all__ if name not in makers and not name.endswith("Error"))]
    return {name: getattr(package, name) for name in names}


def examples_of(package: ModuleType) -> Iterator[doctest.DocTest]:
    """Yield the examples of each public name, of classes with those of their methods."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name, public in public_names(package).items():
        yield from finder.find(public, f"{package.__name__}.{name}", globs={})


@pytest.mark.parametrize("package", PACKAGES)
def test_examples_run(package: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))  # an example registers a policy
    made: dict[str, Any] = {name: getattr(package, name) for name in package.__all__}
    made |= {"Path": Path, "torch": torch}
    makers = {f"{package.__name__}.{name}" for name in MAKERS[package.__name__]}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    report: list[str] = []
    for example in examples_of(package):
        example.globs = made if example.name in makers else dict(made)
        runner.run(example, out=report.append, clear_globs=False)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_has_an_example(package: ModuleType) -> None:
    assert [name for name, public in public_names(package).items() if "examples" not in sections_of(public)] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_argument_of_a_function_is_described(package: ModuleType) -> None:
    functions = {name: public for name, public in public_names(package).items() if inspect.isfunction(public)}
    assert functions
    wrong = {}
    for name, function in functions.items():
        described = [entry.name for entry in sections_of(function).get("parameters", [])]
        taken = [*inspect.signature(function).parameters]
        if described != taken:
            wrong[name] = (described, taken)
    assert wrong == {}


def sections_of(public: object) -> dict[str, Any]:
    """Return the content of each section of a docstring as the documentation's site reads it, by kind."""
    docstring = griffe.Docstring(inspect.getdoc(public) or "")
    return {section.kind.value: section.value for section in docstring.parse("google", warnings=False)}
