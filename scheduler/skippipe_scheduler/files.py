"""Reading and writing the scheduler's JSON files: strict parsing, atomic writing, messages that name the place."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar
from unicodedata import category

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from skippipe_scheduler.errors import InputError, SkipPipeError

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]

Model = TypeVar("Model", bound=BaseModel)

LARGEST_FILE_BYTES: Final = 256 * 2**20
"""A larger file is none of ours: the plan of a thousand nodes has some ten million bytes."""
LARGEST_INTEGER: Final = 2**63 - 1
MOST_DIGITS: Final = 20
"""Of a whole number with its sign; Python itself refuses some thousand digits, with an error of its own."""
_NO_KEY: Final = "top level"
"""Where something is wrong with several keys together."""
CONTROL: Final = {"Cc", "Cs", "Zl", "Zp"}
"""Unicode's categories of characters that are no text: control characters, halves of pairs, breaks of lines."""


def check_text(text: str) -> str:
    """Return `text`; raise ValueError where it holds a control character or a line break."""
    if not text.isprintable():
        for character in text:
            if category(character) in CONTROL:
                raise ValueError(f"{text[:40]!r} holds a line break or control character; leave {character!r} out")
    return text


Name = Annotated[str, Field(min_length=1), AfterValidator(check_text)]


class StrictModel(BaseModel):
    """Base of all file formats: immutable, no unknown keys, no silent conversion, no NaN or infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def describe(error: ValidationError) -> str:
    """Return the first problem of a pydantic error as 'key.path: what is wrong (got value)'."""
    errors = error.errors(include_url=False)
    first, location = errors[0], errors[0]["loc"]
    message = first["msg"].removeprefix("Value error, ")
    for other in errors[1:]:
        *key, kind = other["loc"]
        if str(kind).startswith("literal[") and location[: len(key)] == tuple(key) and len(location) > len(key):
            # One of several kinds of values, of which pydantic makes a part of the place.
            location = (*key, *location[len(key) + 1 :])
            message += other["msg"].replace("Input should be", " or", 1) if len(location) == len(key) else ""
            break
    place = ".".join(str(part) for part in location) or _NO_KEY
    place = place if place.isprintable() else repr(place)
    given = first.get("input")
    shown = repr(given)
    if first["type"] == "int_type" and isinstance(given, str) and given.isdecimal():
        message += f"; write {given.lstrip('0') or 0}, without quotes or leading zeros"
    if first["type"] in {"missing", "extra_forbidden", "value_error"} or len(shown) > 60:
        return f"{place}: {message}"
    return f"{place}: {message} (got {shown})"


def describe_made(error: ValidationError) -> str:
    """Return the same for what no file holds: its kind stands before a key, and nothing before what has none."""
    text = describe(error)
    without_key = text.removeprefix(f"{_NO_KEY}: ")
    return without_key if without_key != text else f"{error.title}: {text}"


def read_text(path: Path, error: type[InputError]) -> str:
    """Read a text file; raise `error` with the reason and the place when that is impossible."""
    try:
        with path.open("rb") as stream:
            content = stream.read(LARGEST_FILE_BYTES + 1)
        if len(content) > LARGEST_FILE_BYTES:
            raise error(f"{path}: more than {LARGEST_FILE_BYTES // 2**20} MiB; it is none of our files")
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except (OSError, ValueError) as reason:  # the latter: not UTF-8, or a path that cannot be one
        raise error(f"{path}: cannot be read ({reason})") from None


def read_json(path: Path, error: type[InputError]) -> dict[str, Any]:
    """Read a JSON object from `path`; raise `error` with the reason and the place when that is impossible."""
    content = parse_json(read_text(path, error), str(path), error)
    if not isinstance(content, dict):
        raise error(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def parse_json(text: str | bytes, place: str, error: type[InputError]) -> Any:
    """Return the value that a JSON text stands for; raise `error`, which begins with `place`, where it is none."""
    try:
        return json.loads(text, parse_int=_whole)
    except json.JSONDecodeError as reason:
        raise error(
            f"{place}: not valid JSON at line {reason.lineno}, column {reason.colno} ({reason.msg}); "
            "the file may be truncated"
        ) from None
    except RecursionError:
        raise error(f"{place}: nested too deeply to be one of our files") from None
    except ValueError as reason:  # of a whole number, or bytes that are no text
        raise error(f"{place}: cannot be read ({reason})") from None


def json_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the JSON object of each line, None for a damaged line; raise OSError where the file cannot be read."""
    with path.open(encoding="utf-8", errors="replace") as stream:
        yield from json_objects(stream)


def json_objects(lines: Iterable[str]) -> Iterator[dict[str, Any] | None]:
    """Yield the JSON object of each line, None for a damaged line."""
    for line in lines:
        try:
            content = parse_json(line, "", InputError)
        except InputError:
            content = None
        yield content if isinstance(content, dict) else None


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS or abs(value := int(digits)) > LARGEST_INTEGER:
        raise ValueError(f"the whole number {digits[:10]}... of {len(digits)} digits is beyond {LARGEST_INTEGER}")
    return value


def parse(model: type[Model], content: dict[str, Any], place: str, error: type[InputError]) -> Model:
    """Validate `content` as `model`; `place` (usually the file) begins the message of `error`."""
    try:
        return model.model_validate_json(json.dumps(content))
    except ValidationError as reason:
        raise error(f"{place}: {describe(reason)}") from None


def write_atomically(path: Path, text: str, *, private: bool = False, check: Callable[[], None] = lambda: None) -> None:
    """Write a text as `replace_file` does; raise `SkipPipeError` naming the file where that is impossible."""
    try:
        replace_file(path, text.encode(), private=private, check=check)
    except OSError as reason:
        raise SkipPipeError(f"{path}: cannot be written ({reason.strerror or reason})") from None


def replace_file(
    path: Path, content: bytes, *, private: bool = False, check: Callable[[], None] = lambda: None
) -> None:
    """Write `content` beside `path`, flush it to disk, then rename: readers see the old file or the whole new one.

    A `private` file is readable for this user alone, from its first byte on. `check` raises where the file may not be
    replaced any more, as flushing takes its time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, private=private, check=check) as stream:
        stream.write(content)


@contextmanager
def replacing(
    path: Path, *, private: bool = False, durable: bool = True, check: Callable[[], None] = lambda: None
) -> Iterator[BufferedRandom]:
    """Give an empty file to write that takes the place of `path` once it is left without an error; see `replace_file`.

    One that is not `durable` is not flushed to disk: after a crash of the machine it may be damaged.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "w+b", opener=_private if private else None) as stream:
            yield stream
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        check()
        aside.replace(path)
    except BaseException:
        with suppress(OSError):  # the folder itself may be what is wrong
            aside.unlink()
        raise


def _private(path: str, flags: int) -> int:
    """Open a new file for this user alone; one that is there under its name is another's, or left by a crash."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    return os.open(path, flags | os.O_EXCL, 0o600)
