"""What a forge and other tools read from the repository: it parses, and says what the project's own files say."""

import ast
import datetime
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import skippipe

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
CONTROLS = {"markdown", "input", "textarea", "dropdown", "checkboxes"}
"""What a form may consist of."""
NAMES_OF_DISTRIBUTIONS = {"yaml": "pyyaml", "lm_eval": "lm-eval", "lazy_loader": "lazy-loader", "zmq": "pyzmq"}
"""Where they differ from the names that are imported."""


def parsed(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def release_date() -> datetime.date:
    """Return the date that the changelog gives for this version."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(rf"^## \[{re.escape(skippipe.__version__)}\] - (\d+-\d+-\d+)$", changelog, flags=re.MULTILINE)
    assert len(headings) == 1, f"CHANGELOG.md needs one line '## [{skippipe.__version__}] - YEAR-MONTH-DAY'"
    return datetime.date.fromisoformat(headings[0])


def test_the_version_has_a_dated_section_with_content() -> None:
    assert release_date()
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]
    assert sections[0].startswith("[Unreleased]")
    assert sections[1].startswith(f"[{skippipe.__version__}]")
    assert len(re.findall(r"^- ", sections[1], flags=re.MULTILINE)) > 10


def test_the_citation_is_of_this_version() -> None:
    citation = parsed(ROOT / "CITATION.cff")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert (citation["version"], citation["date-released"]) == (skippipe.__version__, release_date())
    assert (citation["license"], citation["keywords"]) == (project["license"], project["keywords"])


def test_the_workflow_runs_the_continuous_integration_of_every_supported_python() -> None:
    workflow = parsed(GITHUB / "workflows" / "ci.yml")
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML reads the key "on" as true
    job = workflow["jobs"]["test"]
    assert [step["run"].split()[-1] for step in job["steps"] if "run" in step] == [".ci/run"]
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    versions = [name.rsplit(" ", maxsplit=1)[1] for name in classifiers if re.search(r":: 3\.\d+$", name)]
    assert job["strategy"]["matrix"]["python"] == versions
    for other in workflow["jobs"].values():
        commands = [step["run"].split()[-1] for step in other["steps"] if "run" in step]
        assert [command for command in commands if not (ROOT / command).stat().st_mode & 0o111] == []


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_the_issue_template_is_a_form(name: str) -> None:
    form = parsed(GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml")
    assert form["name"]
    assert form["description"]
    assert {element["type"] for element in form["body"]} <= CONTROLS
    asked = [element for element in form["body"] if element["type"] != "markdown"]
    assert all(element["attributes"]["label"] for element in asked)
    assert len({element["id"] for element in asked}) == len(asked)
    assert any(element.get("validations", {}).get("required") for element in asked)


def test_the_pull_request_template_names_programs_that_exist() -> None:
    template = (GITHUB / "pull_request_template.md").read_text(encoding="utf-8")
    named = re.findall(r"`(?:python )?([\w./]+)`", template)
    assert len(named) == 2
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_hooks_are_the_checkers_of_the_tests() -> None:
    """One environment, so that the version of each tool stands in one place."""
    (repository,) = parsed(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    entries = [hook["entry"].split() for hook in repository["hooks"]]
    assert [entry[:4] for entry in entries] == [
        [".venv/bin/python", "-m", "ruff", "check"],
        [".venv/bin/python", "-m", "ruff", "format"],
        [".venv/bin/python", "-m", "mypy"],
    ]


def test_every_package_that_is_imported_is_declared() -> None:
    """What comes only because something else brings it goes with that."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {re.split(r"[<>=\[]", line)[0] for line in lines}
    sources = [*(ROOT / "skippipe").rglob("*.py"), *(ROOT / "scheduler").rglob("*.py")]
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    packages = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names
    distributions = {NAMES_OF_DISTRIBUTIONS.get(name, name) for name in packages}
    assert distributions - declared == {"skippipe", "skippipe_scheduler"}
