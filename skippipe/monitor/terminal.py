"""Text that fits the terminal which it is printed on; in a file, lines stay as long as they are."""

import os
import sys
import textwrap
from collections.abc import Iterable
from typing import TextIO

from tqdm import tqdm

GAP = "  "
"""Between the parts of one line."""


def columns(stream: TextIO) -> int | None:
    """Return how many characters a line of the terminal behind `stream` holds; None where it is no terminal."""
    if not stream.isatty():
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except OSError:
        return None


def say(text: str, *, err: bool = False) -> None:
    """Print on standard output (or error), above a progress bar if there is one; lines are broken between words."""
    stream = sys.stderr if err else sys.stdout
    with tqdm.external_write_mode(file=stream):
        print(broken(text, columns(stream)), file=stream, flush=True)


def broken(text: str, width: int | None) -> str:
    """Return `text` with lines of more than `width` characters broken between words."""
    if width is None:
        return text
    return "\n".join(part for line in text.split("\n") for part in _parts(line, width))


def fitting(parts: Iterable[str], width: int | None) -> str:
    """Return the first of the parts, the most important ones first, as many as a line of `width` characters holds."""
    first, *others = parts
    line = first
    for part in others:
        if width is not None and len(line) + len(GAP) + len(part) > width:
            break
        line += GAP + part
    return line


def _parts(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    indent = " " * (len(line) - len(line.lstrip())) + GAP
    return textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
