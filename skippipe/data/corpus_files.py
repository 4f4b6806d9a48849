"""The files of a corpus: which ones are read, which ones are left out, and how they are opened."""

import bz2
import glob
import gzip
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Final, TextIO

from skippipe.config.data_options import DataOptions
from skippipe.errors import DataError

KINDS: Final = {"text": ".txt", "jsonl": ".jsonl", "parquet": ".parquet"}
"""What files of a directory end in, by `data.source`."""
COMPRESSIONS: Final[dict[str, Callable[..., Any]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
ZSTANDARD: Final = ".zst"
READ_ERRORS: Final = (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError)
"""What reading a damaged file raises."""


@dataclass
class FoundFiles:
    """The files of a corpus, sorted, and what beside them was not taken."""

    files: list[Path] = field(default_factory=list)
    other_kinds: Counter[str] = field(default_factory=Counter)
    """Files of other kinds in the directories, by their ending."""
    repeated: int = 0
    """Files that are read already, under another name."""

    @property
    def left_out(self) -> list[str]:
        """What is left out, in words."""
        said = []
        if self.other_kinds:
            endings = ", ".join(name or "no ending" for name, _ in self.other_kinds.most_common(5))
            said.append(f"{self.other_kinds.total():,} files of other kinds ({endings})")
        if self.repeated:
            said.append(f"{self.repeated:,} links to files that are read already")
        return said


def named_files(options: DataOptions) -> list[Path]:
    """Return the local files of the corpus, sorted; raise `DataError` for a missing one."""
    if options.source in KINDS:
        return find_files(options).files
    return _files_below(options.dataset) if options.source == "huggingface" else []


def is_here(options: DataOptions) -> bool:
    """Say whether this host has the text, or can have it from the hub."""
    if options.dataset is not None and os.path.isabs(options.dataset) and not os.path.exists(options.dataset):
        return False
    try:
        named_files(options)
    except DataError:
        return False
    return True


def find_files(options: DataOptions) -> FoundFiles:
    """Return the files that `data.paths` name; a directory stands for those in it, also behind symbolic links.

    Files may be compressed. Raises `DataError` where there is none.
    """
    kind = KINDS[options.source]
    endings = (kind,) if options.source == "parquet" else (kind, *(kind + end for end in (*COMPRESSIONS, ZSTANDARD)))
    found, named = FoundFiles(), set[Path]()
    for pattern in options.paths:
        for match in _matches(pattern):
            if not match.is_dir():
                named.add(match)
                continue
            for path in _walk(match):
                if path.name.endswith(endings):
                    named.add(path)
                else:
                    found.other_kinds[path.suffix] += 1
    if not named:
        said = f"; left out: {', '.join(found.left_out)}" if found.left_out else ""
        raise DataError(f"data.paths: no *{kind} files in {', '.join(options.paths)}{said}")
    seen = set[Path]()
    for path in sorted(named):
        if path.resolve() in seen:
            found.repeated += 1
        else:
            seen.add(path.resolve())
            found.files.append(path)
    return found


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a file as UTF-8 text, without its byte order mark; decompress what its name says is compressed.

    Raises `DataError` where it cannot be read, also while it is read.
    """
    opener = _zstandard(path) if path.suffix == ZSTANDARD else COMPRESSIONS.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8-sig") as stream:
            yield stream
    except READ_ERRORS as reason:
        raise DataError(f"data.paths: {path}: cannot be read as UTF-8 text ({reason})") from None


def _zstandard(path: Path) -> Callable[..., Any]:
    try:
        opener: Callable[..., Any] = import_module("zstandard").open
    except ImportError:
        raise DataError(f"data.paths: {path}: reading it needs zstandard; pip install zstandard") from None
    return opener


def _matches(pattern: str) -> list[Path]:
    whole = Path(pattern)
    matches = [whole] if whole.exists() else [Path(match) for match in glob.glob(pattern, recursive=True)]
    if not matches:
        raise DataError(f"data.paths: {pattern}: no such file; correct the path (seen from {Path.cwd()})")
    return matches


def _walk(directory: Path) -> Iterator[Path]:
    """Yield the files below a directory, each directory once, however many links lead to it."""
    seen = {directory.resolve()}
    for folder, below, files in os.walk(directory, followlinks=True):
        yield from (Path(folder, name) for name in files)
        below.sort()
        for name in tuple(below):
            real = Path(folder, name).resolve()
            if real in seen:
                below.remove(name)
            seen.add(real)


def _files_below(directory: str | None) -> list[Path]:
    if directory is None or not Path(directory).is_dir():
        return []  # the name of something on the hub
    return sorted(_walk(Path(directory)))
