"""Reading YAML as data, by the core schema of YAML 1.2: `yes` is a text, `010` and `1:30` are no numbers.

Duplicate keys, control characters and whole numbers of more than 64 bits are refused; unknown keys are answered with
the nearest known one.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Final, get_args

import yaml
from pydantic import BaseModel, ValidationError
from yaml.constructor import ConstructorError

try:
    from yaml import CSafeLoader as SafeLoader
except ImportError:  # a build of PyYAML without libyaml, ten times as slow
    from yaml import SafeLoader  # type: ignore[assignment]  # its twin in Python

from skippipe_scheduler.errors import InputError, nearest
from skippipe_scheduler.files import LARGEST_INTEGER, Model, check_text, describe, read_text

MOST_NODES: Final = 1_000_000
"""Values of one file, those of repeated aliases counted again: a few lines of aliases would expand to any number."""
TAG: Final = "tag:yaml.org,2002:"
INTEGER: Final = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)")
SCALARS: Final = {
    "null": (re.compile(r"~|null|Null|NULL|"), ("~", "n", "N", "")),
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), tuple("tTfF")),
    "int": (INTEGER, tuple("-+0123456789")),
    "float": (
        re.compile(
            r"[-+]?(?:0|[1-9][0-9_]*)?\.[0-9]+(?:[eE][-+]?[0-9]+)?|[-+]?(?:0|[1-9][0-9_]*)\.?(?:[eE][-+]?[0-9]+)"
            r"|[-+]?(?:0|[1-9][0-9_]*)\.|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
        ),
        tuple("-+.0123456789"),
    ),
    "merge": (re.compile(r"<<"), ("<",)),
}
"""How each kind of plain scalar is written, and with which characters it can begin; everything else is a text."""


class CoreLoader(SafeLoader):
    """Constructs nothing but mappings, lists, texts, numbers, true, false and null."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  # as in the base
    yaml_constructors: ClassVar[dict[Any, Any]] = {}

    def construct_document(self, node: yaml.Node) -> Any:
        """See the base; refuse aliases that expand without end."""
        self._count(node, {})
        return super().construct_document(node)

    def construct_scalar(self, node: Any) -> Any:
        """Return the text of a scalar, without control characters."""
        text = super().construct_scalar(node)
        try:
            return check_text(text)
        except ValueError as reason:
            raise ConstructorError(None, None, str(reason), node.start_mark) from None

    def mapping(self, node: Any) -> Any:
        """Construct a mapping, each key once."""
        yield (content := {})
        if not isinstance(node, yaml.MappingNode):
            raise ConstructorError(None, None, "expected keys and values", node.start_mark)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != f"{TAG}merge":
                if key.value in seen:
                    raise ConstructorError(None, None, f"duplicate key {key.value}", key.start_mark)
                seen.add(key.value)
        content.update(self.construct_mapping(node))

    def integer(self, node: Any) -> int:
        """Construct a whole number."""
        text = self.construct_scalar(node)
        if not INTEGER.fullmatch(text):
            raise ConstructorError(None, None, f"{text[:20]!r} is no whole number", node.start_mark)
        if len(text) > 40 or abs(value := int(text.replace("_", ""), 0)) > LARGEST_INTEGER:
            shown = text if len(text) <= 40 else f"{text[:10]}... ({len(text)} digits)"
            raise ConstructorError(None, None, f"{shown} is beyond {LARGEST_INTEGER}", node.start_mark)
        return value

    def number(self, node: Any) -> float:
        """Construct a number that need not be whole."""
        text = self.construct_scalar(node).replace("_", "")
        try:
            return float(re.sub(r"^([-+]?)\.(?=[inIN])", r"\1", text))
        except ValueError:
            raise ConstructorError(None, None, f"{text[:20]!r} is no number", node.start_mark) from None

    def truth(self, node: Any) -> bool:
        """Construct true or false."""
        text = self.construct_scalar(node)
        if text.lower() not in {"true", "false"}:
            raise ConstructorError(None, None, f"{text[:20]!r} is neither true nor false", node.start_mark)
        return bool(text.lower() == "true")

    def _count(self, node: yaml.Node, counts: dict[int, int]) -> int:
        """Return how many values a node stands for."""
        if id(node) in counts:
            if not counts[id(node)]:
                raise ConstructorError(None, None, "an alias leads to itself", node.start_mark)
            return counts[id(node)]
        counts[id(node)] = 0
        below = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = (part for entry in below for part in (entry if isinstance(entry, tuple) else (entry,)))
        counts[id(node)] = total = 1 + sum(self._count(part, counts) for part in parts)
        if total > MOST_NODES:
            raise ConstructorError(None, None, f"more than {MOST_NODES:,} values, aliases expanded", node.start_mark)
        return total


for _kind, (_pattern, _first) in SCALARS.items():
    _whole = re.compile(f"^(?:{_pattern.pattern})$(?!\n)")
    CoreLoader.add_implicit_resolver(f"{TAG}{_kind}", _whole, list(_first))
CoreLoader.yaml_constructors |= {
    f"{TAG}null": CoreLoader.construct_yaml_null,
    f"{TAG}bool": CoreLoader.truth,
    f"{TAG}int": CoreLoader.integer,
    f"{TAG}float": CoreLoader.number,
    f"{TAG}str": CoreLoader.construct_scalar,
    f"{TAG}seq": CoreLoader.construct_yaml_seq,
    f"{TAG}map": CoreLoader.mapping,
    None: CoreLoader.construct_undefined,
}


def parse_yaml_text(text: str, place: str, error: type[InputError]) -> Any:
    """Return the value that a YAML text stands for; raise `error`, which begins with `place`, where it is none."""
    try:
        return yaml.load(text, Loader=CoreLoader)
    except yaml.YAMLError as reason:
        raise error(f"{place}: not valid YAML ({' '.join(str(reason).split())})") from None
    except RecursionError:
        raise error(f"{place}: nested too deeply to be one of our files") from None
    except (ValueError, TypeError) as reason:  # of a scalar under an explicit tag
        raise error(f"{place}: not valid YAML ({reason})") from None


def read_yaml(path: Path, error: type[InputError]) -> dict[str, Any]:
    """Read keys and values from `path`; raise `error` with the reason and the place when that is impossible.

    Interpolations such as `${key}` stay as they are written.
    """
    content = parse_yaml_text(read_text(path, error), str(path), error)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise error(f"{path}: expected keys and values, found a list or a bare value")
    return content


def parse_yaml(model: type[Model], content: dict[str, Any], place: str, error: type[InputError]) -> Model:
    """Validate `content` as `model`; an unknown key is reported first: it often explains a missing one."""
    try:
        return model.model_validate_json(json.dumps(content))
    except TypeError as reason:
        raise error(f"{place}: only text, numbers, lists and keys can be read ({reason})") from None
    except ValidationError as reason:
        for offence in reason.errors(include_url=False):
            if offence["type"] == "extra_forbidden":
                raise error(f"{place}: {_unknown_key(model, offence['loc'])}") from None
        raise error(f"{place}: {describe(reason)}") from None


def _unknown_key(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    for part in location[:-1]:
        annotation = _keys(model).get(str(part))  # none for a place in a list, nor for a name that the file gives
        model = next(_models(annotation), model)
    path = ".".join(map(str, location))
    return f"unknown key {path!r}; {nearest(str(location[-1]), list(_keys(model)))}"


def _keys(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)
