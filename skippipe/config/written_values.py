"""What a value written in YAML means where the key's type is known: `name: 2024` is a text, `max_steps: 1e3` a number.

YAML tells kinds of values apart by their looks alone. Here only what cannot be meant otherwise is changed into another
kind; everything else is left to the strict check of the types, which refuses it.
"""

from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from pydantic import BaseModel

TRUTH: Final = {"yes": True, "on": True, "no": False, "off": False}
"""What YAML 1.1 read as true and false."""
LARGEST_WHOLE: Final = 2.0**53
"""Up to here every whole number is a float of its own."""


def as_meant(value: Any, annotation: Any) -> Any:
    """Return `value` as a field of type `annotation` takes it, where only one thing can be meant; else as it is."""
    kinds = list(_alternatives(annotation))
    if isinstance(value, dict):
        return _mapping(value, kinds)
    if isinstance(value, list):
        return _list(value, kinds)
    if isinstance(value, float) and int in kinds and float not in kinds:
        return int(value) if value.is_integer() and abs(value) <= LARGEST_WHOLE else value
    if type(value) is int and str in kinds and not {int, float} & set(kinds):
        return str(value)
    if isinstance(value, str) and bool in kinds and value not in kinds:
        return TRUTH.get(value.lower(), value)
    return value


def _alternatives(annotation: Any) -> list[Any]:
    """Return the types, and the values of a Literal, that an annotation allows."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _alternatives(arguments[0])
    if origin in (Union, UnionType):
        return [kind for part in arguments for kind in _alternatives(part)]
    return list(arguments) if origin is Literal else [annotation]


def _mapping(value: Mapping[Any, Any], kinds: list[Any]) -> dict[Any, Any]:
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            fields = kind.model_fields
            return {
                key: as_meant(part, fields[key].annotation) if key in fields else part for key, part in value.items()
            }
        if get_origin(kind) is dict:
            return {key: as_meant(part, get_args(kind)[1]) for key, part in value.items()}
    return dict(value)


def _list(value: list[Any], kinds: list[Any]) -> list[Any]:
    for kind in kinds:
        arguments = get_args(kind)
        if get_origin(kind) is tuple and arguments[-1] is Ellipsis:
            return [as_meant(part, arguments[0]) for part in value]
        if get_origin(kind) is tuple and len(arguments) == len(value):
            return [as_meant(part, argument) for part, argument in zip(value, arguments, strict=True)]
    return value
