"""The pages of the public Python names: a table of them, and for each what mkdocstrings shows on the site."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[2]
SEARCH_PATHS = (ROOT, ROOT / "scheduler")
INTRODUCTIONS = {
    "skippipe": "What a program uses of the trainer: experiments, training, a trained model, its evaluation.",
    "skippipe_scheduler": "The planner by itself: it needs no torch, and no experiment.",
}
ABOUT = """

A name that is not here may change without notice. Each is imported from the package, as in `from {package} import
{example}`, and loaded when it is first used. The site shows signature and members below the table; in Python,
`help({package}.{example})` does. The examples run in the tests, from the folder of the repository; {made}
"""
MADE = {
    "skippipe": """`experiment` is that of `load_experiment`, `summary` and runs/tiny are what `train_experiment` made,
and `model` is what `load_model` returned.""",
    "skippipe_scheduler": """`cluster`, `workload`, `problem`, `plan` and `timeline` are those of `Cluster`, `Workload`,
`build_problem`, `solve` and `simulate`.""",
}
"""What an example finds; the makers of tests/repository/test_api_examples.py."""
EXAMPLES = {"skippipe": "train_experiment", "skippipe_scheduler": "solve"}
KINDS = {"Functions": "function", "Classes": "class", "Errors": "error"}


def api_page(package: str) -> str:
    """Return the page of one package; the names are those of its `__all__`."""
    loader = griffe.GriffeLoader(search_paths=SEARCH_PATHS)
    loaded = {name: loader.load(name) for name in INTRODUCTIONS}  # both, for one exports errors of the other
    loader.resolve_aliases()
    exported = sorted(importlib.import_module(package).__all__)
    names = {name: loaded[package][name].final_target for name in exported}
    introduction = INTRODUCTIONS[package] + ABOUT.format(package=package, example=EXAMPLES[package], made=MADE[package])
    parts = [f"# Python: {package}\n", introduction, *_programs(package)]
    for heading, kind in KINDS.items():
        chosen = {name: found for name, found in names.items() if _kind(found) == kind}
        parts += [f"## {heading}\n", "| name | what it is |", "|---|---|"]
        parts += [f"| [`{name}`](#{package}.{name}) | {_summary(found)} |" for name, found in chosen.items()]
        parts += ["", *(f"::: {package}.{name}\n" for name in chosen)]
    return "\n".join(parts)


def _programs(package: str) -> Iterator[str]:
    """Yield links to the examples that import the package, each with the first line of its docstring."""
    yield "Programs that use it:\n"
    for path in sorted((ROOT / "examples").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if re.search(rf"^(from|import) {package}\b", text, flags=re.MULTILINE):
            about = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
            yield f"- [{path.name}](../../examples/{path.name}): {about}"
    yield ""


def _kind(found: griffe.Object) -> str:
    return "error" if found.name.endswith("Error") else found.kind.value


def _summary(found: griffe.Object) -> str:
    """Return the first sentence of a docstring."""
    if found.docstring is None:
        raise LookupError(f"{found.canonical_path} needs a docstring")
    paragraph = " ".join(found.docstring.value.split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z`])", paragraph)[0].replace("|", "\\|")
