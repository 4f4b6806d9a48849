"""The files of a corpus: which ones are read, which ones are left out, and how they are opened."""

import bz2
import glob
import gzip
import io
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Final, Self, TextIO, cast

from skippipe.config.data_options import DataOptions
from skippipe.config.places import is_url
from skippipe.errors import DataError, SkipPipeError

KINDS: Final = {"text": ".txt", "jsonl": ".jsonl", "parquet": ".parquet"}
"""What files of a directory end in, by `data.source`."""
COMPRESSIONS: Final[dict[str, Callable[..., Any]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
ZSTANDARD: Final = ".zst"
READ_ERRORS: Final = (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError)
"""What reading a damaged file raises."""
VERSION_KEYS: Final = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "updated", "mtime", "created")
"""Where file systems say which version of a file they hold, the surest first."""


@dataclass(frozen=True, order=True)
class RemoteFile:
    """A file that fsspec reads by its URL: read from its start on, never stored as a whole."""

    url: str
    size_bytes: int | None
    """None where the server does not say it."""
    version: str
    """Changes with the content, where the server says so."""
    place: str
    """Its name for `system`, which fsspec made for the URL."""
    system: Any = field(compare=False, repr=False)

    @classmethod
    def of(cls, system: Any, place: str, facts: dict[str, Any]) -> Self:
        """Return the file at `place`, with the `facts` that its file system tells about it."""
        version = next((str(facts[key]) for key in VERSION_KEYS if facts.get(key)), "")
        return cls(system.unstrip_protocol(place), facts.get("size"), version, place, system)

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the path in the URL."""
        path = self.url.partition("?")[0] if self.url.startswith("http") else self.url
        return PurePosixPath(path).name

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return PurePosixPath(self.name).suffix


CorpusFile = Path | RemoteFile
FileIdentity = list[str | int | None]
"""The place of a file, its size, and what changes with its content."""


@dataclass
class FoundFiles:
    """The files of a corpus, sorted, and what beside them was not taken."""

    files: list[CorpusFile] = field(default_factory=list)
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


def named_files(options: DataOptions) -> list[CorpusFile]:
    """Return the files of the corpus, in the order of reading; raise `DataError` for a missing one."""
    if options.source in KINDS:
        return find_files(options).files
    return [*_files_below(options.dataset)] if options.source == "huggingface" else []


def file_identities(options: DataOptions) -> list[FileIdentity]:
    """Return what says of the files of the corpus whether they are still the same; raises as `named_files` does."""
    return [_identity(path) for path in named_files(options)]


def _identity(path: CorpusFile) -> FileIdentity:
    if isinstance(path, RemoteFile):
        return [path.url, path.size_bytes, path.version]
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def is_here(options: DataOptions) -> bool:
    """Say whether this host has the text, or can have it from the hub."""
    if options.dataset is not None and os.path.isabs(options.dataset) and not os.path.exists(options.dataset):
        return False
    try:
        named_files(options)
    except SkipPipeError:
        return False
    return True


def find_files(options: DataOptions) -> FoundFiles:
    """Return the files that `data.paths` name; a directory stands for those in it, also behind symbolic links.

    Files may be compressed. Those named by URLs come after the local ones, sorted by URL.

    Raises `DataError` where there is none.
    """
    kind = KINDS[options.source]
    endings = (kind,) if options.source == "parquet" else (kind, *(kind + end for end in (*COMPRESSIONS, ZSTANDARD)))
    found, named, remote = FoundFiles(), set[Path](), set[RemoteFile]()
    for pattern in options.paths:
        if is_url(pattern):
            remote.update(_remote_files(pattern, endings, found))
            continue
        for match in _matches(pattern):
            if not match.is_dir():
                named.add(match)
                continue
            for path in _walk(match):
                if path.name.endswith(endings):
                    named.add(path)
                else:
                    found.other_kinds[path.suffix] += 1
    if not named and not remote:
        said = f"; left out: {', '.join(found.left_out)}" if found.left_out else ""
        raise DataError(f"data.paths: no *{kind} files in {', '.join(options.paths)}{said}")
    seen = set[Path]()
    for path in sorted(named):
        if path.resolve() in seen:
            found.repeated += 1
        else:
            seen.add(path.resolve())
            found.files.append(path)
    found.files += sorted(remote)
    return found


@contextmanager
def open_text(path: CorpusFile) -> Iterator[TextIO]:
    """Open a file as UTF-8 text, without its byte order mark; decompress what its name says is compressed.

    Raises `DataError` where it cannot be read, also while it is read.
    """
    opener = _zstandard(path) if path.suffix == ZSTANDARD else COMPRESSIONS.get(path.suffix)
    try:
        with open_binary(path, in_order=True) as content:
            if opener is None:
                yield io.TextIOWrapper(content, encoding="utf-8-sig")
                return
            with opener(content, "rt", encoding="utf-8-sig") as stream:
                yield stream
    except READ_ERRORS as reason:
        raise DataError(f"data.paths: {path}: cannot be read as UTF-8 text ({reason})") from None


@contextmanager
def open_binary(path: CorpusFile, *, in_order: bool = False) -> Iterator[BinaryIO]:
    """Open a file as it is stored; `in_order` where it is only read from its start on.

    Raises `OSError` for a local file, `DataError` for a remote one that cannot be read, also while it is read.
    """
    if isinstance(path, Path):
        with path.open("rb") as stream:
            yield stream
        return
    # Not every web server sends parts of a file: one answer is read to its end.
    whole = {"block_size": 0} if in_order and path.url.startswith("http") else {}
    try:
        with path.system.open(path.place, "rb", **whole) as stream:
            yield cast("BinaryIO", stream)
    except (DataError, *READ_ERRORS):
        raise
    except Exception as reason:  # each file system has errors of its own
        raise _unreadable(path.url, reason) from None


def _remote_files(url: str, endings: tuple[str, ...], found: FoundFiles) -> Iterator[RemoteFile]:
    """Yield the files that a URL names: one, those of a folder (of a web server: ends in /), or those of a pattern."""
    from fsspec.core import url_to_fs

    try:
        system, place = url_to_fs(url)
        for match in _remote_matches(system, place):
            facts = system.info(match)
            if not url.endswith("/") and facts["type"] != "directory":
                yield RemoteFile.of(system, match, facts)
                continue
            for below in sorted(system.find(match)):
                if below.endswith(endings):
                    yield RemoteFile.of(system, below, system.info(below))
                else:
                    found.other_kinds[PurePosixPath(below).suffix] += 1
    except FileNotFoundError as reason:  # some file systems say so of a server that does not answer, too
        why = f" ({reason.__cause__})" if reason.__cause__ else ""
        raise DataError(f"data.paths: {url}: no such file{why}; check the URL, and that its server answers") from None
    except Exception as reason:  # each file system has errors of its own; ImportError where its package is missing
        raise _unreadable(url, reason) from None


def _remote_matches(system: Any, place: str) -> list[str]:
    try:
        system.info(place)
    except FileNotFoundError:
        matches: list[str] = system.glob(place) if glob.has_magic(place) else []
        if not matches:
            raise
        return matches
    return [place]


def _unreadable(url: str, reason: Exception) -> DataError:
    why = (str(reason).splitlines() or [""])[0]
    return DataError(
        f"data.paths: {url}: cannot be read ({type(reason).__name__}: {why}); check the URL, the network and the "
        "credentials"
    )


def _zstandard(path: CorpusFile) -> Callable[..., Any]:
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
