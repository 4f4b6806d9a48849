"""What may stand in an experiment, cluster, problem or plan file, read from the typed models.

The one source of `skippipe config --explain` and of the generated pages of the documentation.
"""

import inspect
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from skippipe.config.key_names import models_in, suggestion
from skippipe.config.type_words import type_in_words
from skippipe.errors import ConfigError

FileKind = Literal["experiment", "cluster", "problem", "plan"]
WRITTEN_IN_JSON = ("problem", "plan")
"""Kinds of files that are JSON; the others are YAML."""
SHOWN_OF_SECTION = 2
"""Keys in the example of a section that has none of its own, where not more have to be given."""


@dataclass(frozen=True)
class KeyReference:
    """One key; `name` is dotted, as in `pipeline.skip_ratio`. Default and example are written as in the file."""

    name: str
    type: str
    """What values it takes, in words."""
    default: str | None
    """None where the key has to be given, or holds further keys with defaults of their own."""
    required: bool
    meaning: str
    example: str
    assignment: str
    """The example with its key, as on a command line where that can set the key, else as in the file."""
    keys: tuple["KeyReference", ...] = ()
    """What a section holds, in the order of the models."""

    def walk(self) -> Iterator["KeyReference"]:
        """Yield the key and all below it, a section before what it holds."""
        yield self
        for key in self.keys:
            yield from key.walk()


def file_model(kind: FileKind) -> type[BaseModel]:
    """Return the model of a kind of file, whose module is imported only now."""
    if kind == "experiment":
        from skippipe.config.experiment import Experiment

        return Experiment
    if kind == "cluster":
        from skippipe_scheduler.problem.cluster import Cluster

        return Cluster
    if kind == "problem":
        from skippipe_scheduler.problem.problem import Problem

        return Problem
    from skippipe_scheduler.plan.plan import Plan

    return Plan


def file_reference(kind: FileKind) -> tuple[KeyReference, ...]:
    """Return the top-level keys of a kind of file, each with what it holds.

    Raises LookupError, naming the key, where a model leaves a meaning or an example open.
    """
    return _Reader(kind).keys(file_model(kind))


def find_key(kind: FileKind, name: str) -> KeyReference:
    """Return one key or section; numbers in its name (entries of a list) are passed over.

    Raises `ConfigError` that names the nearest right key.
    """
    wanted = ".".join(part for part in name.split(".") if not part.isdigit())
    for key in file_reference(kind):
        for candidate in key.walk():
            if candidate.name == wanted:
                return candidate
    raise ConfigError(f"unknown key {name!r} of the {kind} file{suggestion(wanted, file_model(kind))}")


def yaml_text(value: Any) -> str:
    """Return a value as it would be written in one line of YAML."""
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")


def example_of(model: type[BaseModel], name: str) -> Any:
    """Return a value for a field: the first of its `examples`, or another than its default, or its default.

    A section's is made of those of the keys that have to be given, or of its first ones. Raises LookupError where there
    is none.
    """
    field = model.model_fields[name]
    if field.examples:
        return field.examples[0]
    sections = list(models_in(field.annotation))
    if sections:
        return [_section_example(sections[0])] if _is_list(field.annotation) else _section_example(sections[0])
    default = field.get_default(call_default_factory=True)
    if field.annotation is bool:
        return not default
    if get_origin(field.annotation) is Literal:
        values = get_args(field.annotation)
        return next((value for value in values if value != default), values[0])
    if field.is_required() or default is None or default == ():
        raise LookupError(f"{model.__name__}.{name} needs an example: Field(..., examples=[...])")
    return list(default) if isinstance(default, tuple) else default


class _Reader:
    """Reads the models of one kind of file."""

    def __init__(self, kind: FileKind) -> None:
        self._overridable = kind == "experiment"
        self._written = json.dumps if kind in WRITTEN_IN_JSON else yaml_text

    def keys(self, model: type[BaseModel], prefix: str = "", *, in_list: bool = False) -> tuple[KeyReference, ...]:
        """Return the keys of a section; those of a list's entries cannot be set one by one."""
        return tuple(self._key(model, name, prefix, in_list) for name in model.model_fields)

    def _key(self, model: type[BaseModel], name: str, prefix: str, in_list: bool) -> KeyReference:
        field = model.model_fields[name]
        short = field.alias or name
        sections = list(models_in(field.annotation))
        inside = in_list or _is_list(field.annotation)
        example = self._written(example_of(model, name))
        return KeyReference(
            name=prefix + short,
            type=type_in_words(field.annotation, field.metadata),
            default=None if field.is_required() or field.annotation in sections else self._written(_default(field)),
            required=field.is_required(),
            meaning=_meaning(model, name, sections),
            example=example,
            assignment=(
                shlex.quote(f"{prefix}{short}={example}")
                if self._overridable and not in_list
                else f"{self._written(short)}: {example}"
            ),
            keys=tuple(key for section in sections for key in self.keys(section, f"{prefix}{short}.", in_list=inside)),
        )


def _meaning(model: type[BaseModel], name: str, sections: list[type[BaseModel]]) -> str:
    """Return the docstring of the field or, of a section, that of its class without the examples in Python."""
    text = model.model_fields[name].description or (sections[0].__doc__ if sections else None)
    if not text:
        raise LookupError(f"{model.__name__}.{name} needs a docstring that says what it means")
    told = inspect.cleandoc(text).partition("\n\nExamples:")[0]
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in told.split("\n\n"))


def _default(field: FieldInfo) -> Any:
    default = field.get_default(call_default_factory=True)
    return list(default) if isinstance(default, tuple) else default


def _section_example(model: type[BaseModel]) -> dict[str, Any]:
    required = [name for name, field in model.model_fields.items() if field.is_required()]
    shown = required if len(required) >= SHOWN_OF_SECTION else list(model.model_fields)[:SHOWN_OF_SECTION]
    return {model.model_fields[name].alias or name: example_of(model, name) for name in shown}


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple
