"""Reading YAML as data: duplicate keys refused, unknown keys answered with the nearest known one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from skippipe_scheduler.errors import InputError, nearest
from skippipe_scheduler.files import Model, describe


def read_yaml(path: Path, error: type[InputError]) -> dict[str, Any]:
    """Read keys and values from `path`; raise `error` with the reason and the place when that is impossible.

    Interpolations such as `${key}` stay as they are written.
    """
    try:
        content = OmegaConf.load(path)
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as reason:
        raise error(f"{path}: cannot be read ({reason})") from None
    except (YAMLError, OmegaConfBaseException) as reason:
        raise error(f"{path}: not valid YAML ({' '.join(str(reason).split())})") from None
    except RecursionError:
        raise error(f"{path}: nested too deeply to be one of our files") from None
    if not isinstance(content, DictConfig):
        raise error(f"{path}: expected keys and values, found a list or a bare value")
    return {str(key): value for key, value in OmegaConf.to_container(content).items()}  # type: ignore[union-attr]


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
        if isinstance(part, str):
            field = _keys(model)[part]
            model = next(_models(field))
    path = ".".join(map(str, location))
    return f"unknown key {path!r}; {nearest(str(location[-1]), list(_keys(model)))}"


def _keys(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)
