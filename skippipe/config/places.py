"""Where the paths of an experiment lead: `~` and variables are replaced, relative ones start at the file naming them.

What lies in the run directory is written relative to it, so that a run can be moved.
"""

import glob
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from skippipe.errors import ConfigError

logger = logging.getLogger(__name__)

FILES: Final = ("cluster", "model.directory")
"""Keys whose relative paths start at the file that names them."""
PATTERNS: Final = "data.paths"
NAMES: Final = ("data.tokenizer", "data.dataset")
"""Keys that hold a path, or else a name of something that is not here."""
FROM_HERE: Final = ("run_dir", "data.cache_dir", "checkpoint.resume", "checkpoint.remote_save_folder")
"""Keys whose relative paths start at the working directory: what is written there, or continued."""
VARIABLE: Final = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Z_][A-Z0-9_]*)\})")
"""A variable of the environment. In braces only in capitals: others are keys of the file (`${name}`)."""


def expanded(text: str, place: str) -> str:
    """Return a path with `~`, `$NAME` and `${NAME}` replaced; raise `ConfigError` for a variable that is not set."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise ConfigError(f"{place}: {text!r}: the variable {name} is not set; set it, or write the path itself")
        return os.environ[name]

    return os.path.expanduser(VARIABLE.sub(value, text))


def is_url(text: str) -> bool:
    """Say whether a text is a URL for fsspec (`https://`, `s3://`) and no path of this machine."""
    return re.match(r"[a-z][a-z0-9+.-]*://", text) is not None


def anchor(content: dict[str, Any], folder: Path, place: str) -> None:
    """Replace the paths in the content of a file in `folder`, or of overrides, by complete ones."""
    base = folder.absolute()

    def complete(text: str) -> str:
        return text if "${" in text else str((base / text).resolve())

    for key in FILES:
        _change(content, key, lambda text: complete(expanded(text, place)))
    for key in NAMES:
        _change(content, key, lambda text: _of_name(expanded(text, place), base))
    for key in FROM_HERE:
        _change(content, key, lambda text: expanded(text, place))
    _change(content, "data.cache_dir", lambda text: text if "${" in text else os.path.abspath(text))
    _change(content, PATTERNS, lambda text: _of_pattern(expanded(text, place), base, place))


def relative_inside(content: dict[str, Any], folder: Path) -> None:
    """Replace paths that lead into `folder` by those from there."""
    inside = folder.resolve()

    def shorter(text: str) -> str:
        path = Path(text)
        return f"./{path.relative_to(inside)}" if path.is_absolute() and path.is_relative_to(inside) else text

    for key in (*FILES, *NAMES, PATTERNS):
        _change(content, key, shorter)


def _of_name(text: str, base: Path) -> str:
    """Return the complete path where a name is one, else the name."""
    if "${" in text or os.path.isabs(text):
        return text
    if text.startswith(("./", "../")) or os.path.exists(base / text):
        return str((base / text).resolve())
    return str(Path(text).resolve()) if os.path.exists(text) else text


def _of_pattern(text: str, base: Path, place: str) -> str:
    """Return a file, folder or pattern from the root on.

    What is not there but in the working directory is taken from that, as versions before 0.3 did.
    """
    if "${" in text or os.path.isabs(text) or is_url(text):
        return text
    at_file, here = _from_root(text, base), _from_root(text, Path.cwd())
    if not _matches(at_file) and _matches(here):
        logger.warning("%s: data.paths: %s is in the working directory, not beside the file that names it", place, text)
        return here
    return at_file


def _from_root(text: str, base: Path) -> str:
    whole = os.path.join(base, text)
    return whole if os.path.exists(whole) or not glob.has_magic(text) else os.path.join(glob.escape(str(base)), text)


def _matches(pattern: str) -> bool:
    return os.path.exists(pattern) or next(glob.iglob(pattern, recursive=True), None) is not None


def _change(content: dict[str, Any], key: str, change: Callable[[str], str]) -> None:
    """Replace the text, or the texts of the list, under a dotted key, where they are there."""
    for section, last in _holders(content, key.split(".")):
        value = section[last]
        if isinstance(value, str):
            section[last] = change(value)
        elif isinstance(value, list):
            section[last] = [change(part) if isinstance(part, str) else part for part in value]


def _holders(content: Any, parts: list[str]) -> Iterator[tuple[dict[str, Any], str]]:
    for part in parts[:-1]:
        content = content.get(part) if isinstance(content, dict) else None
    if isinstance(content, dict) and parts[-1] in content:
        yield content, parts[-1]
