"""The reference of all keys: complete, right, and the same in the terminal."""

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
import yaml
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from skippipe.cli.commands.config_command import KINDS
from skippipe.cli.main import main
from skippipe.config.experiment import Experiment
from skippipe.config.experiment_file import load_experiment
from skippipe.config.key_names import known_keys, models_in
from skippipe.config.reference import (
    WRITTEN_IN_JSON,
    FileKind,
    KeyReference,
    example_of,
    file_model,
    file_reference,
    find_key,
)
from skippipe.config.type_words import type_in_words

COMPANIONS = {
    "data": ("data.source=text",),
    "data.source": ("data.paths=[corpus/*.txt]",),
    "emulation.paces": ("emulation.compute=true",),
    "model.directory": ("model.options={}",),
    "optimizer.offload": ("optimizer.backend=deepspeed_zero1",),
    "recipe.full_depth_interval": ("pipeline.skip_ratio=0.5",),
}
"""What has to stand beside an example for the whole experiment to be valid."""


PATHS = {"cluster", "model.directory", "data.paths", "data.cache_dir"}
"""Keys whose relative paths are resolved when they are read."""


def fields(
    model: type[BaseModel], seen: frozenset[type[BaseModel]] = frozenset()
) -> Iterator[tuple[Any, str, FieldInfo]]:
    for name, field in model.model_fields.items():
        yield model, name, field
        for section in models_in(field.annotation):
            if section not in seen:
                yield from fields(section, seen | {model})


def all_keys(kind: FileKind) -> list[KeyReference]:
    return [key for top in file_reference(kind) for key in top.walk()]


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_has_type_meaning_and_example(kind: FileKind) -> None:
    keys = all_keys(kind)
    assert [key.name for key in keys] == list(known_keys(file_model(kind)))
    assert [key.name for key in keys if not (key.type and key.meaning and key.example)] == []
    assert [key.name for key in keys if key.meaning[-1] not in ".!)"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_example_is_valid(kind: FileKind) -> None:
    for model, name, field in fields(file_model(kind)):
        annotated: Any = Annotated[field.annotation, *field.metadata, None]
        adapter = TypeAdapter[Any](annotated)
        adapter.validate_json(json.dumps(example_of(model, name)))


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_and_examples_can_be_read(kind: FileKind) -> None:
    read = json.loads if kind in WRITTEN_IN_JSON else yaml.safe_load
    for key in all_keys(kind):
        read(key.example)
        assert key.default is None or read(key.default) in defaults(kind, key.name)


def defaults(kind: FileKind, name: str) -> list[Any]:
    """Return the defaults of all fields whose key ends like `name`, as JSON would have them."""
    last = name.rpartition(".")[2]
    found = [field for _, short, field in fields(file_model(kind)) if (field.alias or short) == last]
    optional = [field.get_default(call_default_factory=True) for field in found if not field.is_required()]
    values: list[Any] = json.loads(json.dumps(optional, default=vars))
    return values


def settable(keys: Sequence[KeyReference]) -> Iterator[str]:
    """Yield the keys that can be set one by one: not those of a list's entries."""
    for key in keys:
        yield key.name
        if not key.type.startswith("list"):
            yield from settable(key.keys)


@pytest.mark.parametrize("name", settable(file_reference("experiment")))
def test_every_example_works_on_the_command_line(name: str, tmp_path: Path) -> None:
    key = find_key("experiment", name)
    path = tmp_path / "experiment.yaml"
    path.write_text("cluster: /clusters/one.yaml\ndata: {source: python_stdlib}\n")
    (override,) = shlex.split(key.assignment)
    experiment: Any = load_experiment(path, [*COMPANIONS.get(name, ()), override])
    for part in name.split("."):
        experiment = getattr(experiment, part)
    if not key.keys and name not in PATHS:
        assert json.loads(json.dumps(experiment)) == json.loads(json.dumps(yaml.safe_load(key.example)))


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("pipeline.skip_ratio", "experiment", "pipeline.skip_ratio=0.5"),
        ("pipeline.skip_ratio", "experiment", "number (from 0, below 1)"),
        ("data", "experiment", "data.text_key"),
        ("recipe.depth_curriculum.0.share", "experiment", "has to be given"),
        ("nodes.memory_gib", "cluster", "memory_gib: 72.0"),
        ("links.between_nodes.from", "cluster", "from: Iowa"),
        ("microbatches_per_origin.auto", "problem", '"auto": 40'),
        ("order", "plan", "W weight gradient"),
    ],
)
def test_explain_prints_the_reference(capsys: pytest.CaptureFixture[str], name: str, kind: str, expected: str) -> None:
    assert explain(name, "--of", kind) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{name.replace('.0', '')}\n")
    assert expected in printed


def test_explain_of_everything_has_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain() == 0
    blocks = capsys.readouterr().out.split("\n\n")
    headings = [block.splitlines()[0] for block in blocks if not block.startswith(" ")]
    assert headings == list(known_keys(Experiment))


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("pipeline.skip_ration", "experiment", "did you mean 'pipeline.skip_ratio'"),
        ("weight_decay", "experiment", "did you mean 'optimizer.weight_decay'"),
        ("zzz", "experiment", "top-level keys are name, run_dir"),
        ("nodes.memory_gb", "cluster", "did you mean 'nodes.memory_gib'"),
    ],
)
def test_wrong_key_gets_the_nearest_right_one(
    capsys: pytest.CaptureFixture[str], name: str, kind: str, expected: str
) -> None:
    assert explain(name, "--of", kind) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in captured.err
    assert len(captured.err.splitlines()) == 1


def explain(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["config", "--explain", *arguments])
    return int(stop.value.code or 0)


def test_without_a_key_the_sections_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["config"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == list(Experiment.model_fields)


def test_kinds_of_the_command_are_those_of_the_reference() -> None:
    assert get_args(FileKind) == KINDS


class Undocumented(BaseModel):
    number: int = 1
    text: str | None = None


def test_what_a_model_leaves_open_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skippipe.config.reference.file_model", lambda kind: Undocumented)
    with pytest.raises(LookupError, match=r"Undocumented.number needs a docstring"):
        file_reference("experiment")
    with pytest.raises(LookupError, match=r"Undocumented.text needs an example"):
        example_of(Undocumented, "text")


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (int, "whole number"),
        (bool | None, "true, false or null"),
        (tuple[float, float], "list of 2 numbers"),
        (tuple[int, str], "list of whole number, text"),
        (dict[str, tuple[int, ...]], "mapping of texts to lists of whole numbers"),
        (Experiment, "section"),
    ],
)
def test_types_in_words(annotation: Any, expected: str) -> None:
    assert type_in_words(annotation) == expected


def test_a_type_without_words_is_an_error() -> None:
    with pytest.raises(TypeError, match="add them here"):
        type_in_words(complex)
