"""The names of all keys that a typed model allows, in dotted form, and the right one for a wrong one."""

import difflib
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every key of `model` and of its sections in dotted form, a section before its keys."""
    for name, field in model.model_fields.items():
        full = prefix + (field.alias or name)
        yield full
        for section in models_in(field.annotation):
            yield from known_keys(section, f"{full}.")


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that a field's values are made of: its own, or those in its list, mapping or alternatives."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from models_in(part)


def suggestion(key: str, model: type[BaseModel]) -> str:
    """Return '; did you mean ...?' with the key of `model` nearest to `key`, or its top-level keys."""
    known = [name for name in dict.fromkeys(known_keys(model)) if not key.startswith(f"{name}.")]
    section, _, last = key.rpartition(".")
    same = [name for name in known if name.rpartition(".")[2] == last]
    close = sorted(same, key=lambda name: (not name.startswith(f"{section}."), name.count(".")))
    close = close or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:
        by_last = {name.rpartition(".")[2]: name for name in reversed(known)}  # of two, the first stays
        close = [by_last[name] for name in difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)]
    return f"; did you mean {close[0]!r}?" if close else f"; top-level keys are {', '.join(model.model_fields)}"
