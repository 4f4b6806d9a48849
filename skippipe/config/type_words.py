"""What values a field takes, in words that need no Python: "whole number (from 1) or null"."""

from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

NOUNS: Final[dict[Any, tuple[str, str]]] = {
    int: ("whole number", "whole numbers"),
    float: ("number", "numbers"),
    str: ("text", "texts"),
    bool: ("true or false", "true or false"),
    NoneType: ("null", "null"),
    Any: ("any value", "any values"),
}
"""One of them, and several."""
LIMITS: Final = {"ge": "from {}", "gt": "above {}", "le": "to {}", "lt": "below {}", "min_length": "at least {}"}
"""Attributes of a field's metadata, such as `annotated_types.Ge(ge=1)`, in the order of their words."""


def type_in_words(annotation: Any, metadata: Sequence[object] = ()) -> str:
    """Return the values that a field takes; `metadata` are pydantic's limits on it.

    Raises TypeError for a type that has no words yet.
    """
    return _words(Annotated[annotation, *metadata] if metadata else annotation, many=False)


def _words(annotation: Any, *, many: bool) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in NOUNS:
        return NOUNS[annotation][many]
    if origin is Annotated:
        return _words(arguments[0], many=many) + _limits(arguments[1:])
    if origin in (Union, UnionType, Literal):
        return _any_of(_alternatives(annotation, many=many))
    if origin is tuple:
        return _list(arguments, many=many)
    if origin is dict:
        key, value = (_words(argument, many=True) for argument in arguments)
        return f"{'mappings' if many else 'mapping'} of {key} to {value}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "sections" if many else "section"
    if isinstance(annotation, type) and hasattr(annotation, "_fields"):  # a NamedTuple
        return f"{'pairs' if many else 'pair'} [{', '.join(annotation._fields)}]"
    raise TypeError(f"{annotation!r}: no words for this type; add them here")


def _alternatives(annotation: Any, *, many: bool) -> list[str]:
    if get_origin(annotation) is Literal:
        return [f"`{value}`" for value in get_args(annotation)]
    if get_origin(annotation) in (Union, UnionType):
        return [words for part in get_args(annotation) for words in _alternatives(part, many=many)]
    if annotation is bool:
        return ["true", "false"]
    return [_words(annotation, many=many)]


def _list(arguments: tuple[Any, ...], *, many: bool) -> str:
    noun = "lists" if many else "list"
    if arguments[-1] is Ellipsis:
        return f"{noun} of {_words(arguments[0], many=True)}"
    if len(set(arguments)) == 1:
        return f"{noun} of {len(arguments)} {_words(arguments[0], many=True)}"
    return f"{noun} of {', '.join(_words(argument, many=False) for argument in arguments)}"


def _limits(metadata: Sequence[object]) -> str:
    """Return limits in parentheses; those of an `Annotated` lie one level deeper than those of a field."""
    entries = [limit for entry in metadata for limit in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]
    said = [
        words.format(limit)
        for name, words in LIMITS.items()
        for entry in entries
        if (limit := getattr(entry, name, None)) is not None
    ]
    if said == ["at least 1"]:
        return " (not empty)"
    return f" ({' '.join(said).replace(' below', ', below')})" if said else ""


def _any_of(alternatives: Sequence[str]) -> str:
    *others, last = dict.fromkeys(alternatives)
    return f"{', '.join(others)} or {last}" if others else last
