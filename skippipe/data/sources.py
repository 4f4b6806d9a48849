"""Documents of a corpus, in an order that is the same on every machine."""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from skippipe.config.data_options import DataOptions
from skippipe.data.corpus_files import CorpusFile, find_files, open_text
from skippipe.data.rows import row_texts
from skippipe.errors import DataError

LEFT_OUT_OF_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
PIECE_CHARACTERS = 2**18
"""How much of a document is in memory at once, where it comes from a file of its own."""


@dataclass(frozen=True)
class Document:
    """One text of a corpus: where it stands, and the text itself or the file that holds it."""

    place: str
    content: str | CorpusFile

    def pieces(self) -> Iterator[str]:
        """Yield the text in pieces, of which only one is in memory; raise `DataError` where it cannot be read."""
        if isinstance(self.content, str):
            for first in range(0, len(self.content), PIECE_CHARACTERS):
                yield self.content[first : first + PIECE_CHARACTERS]
            return
        with open_text(self.content) as stream:
            while piece := stream.read(PIECE_CHARACTERS):
                yield piece

    def measure(self, prefix: str = "") -> tuple[int, bytes]:
        """Return the bytes of the text in UTF-8, and the SHA-256 of `prefix` and the text."""
        size_bytes, digest = 0, hashlib.sha256(prefix.encode())
        for piece in self.pieces():
            encoded = piece.encode()
            size_bytes += len(encoded)
            digest.update(encoded)
        return size_bytes, digest.digest()

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.pieces())


def documents(options: DataOptions) -> Iterator[Document]:
    """Yield the documents that `options` describe, empty ones too, cut off at `max_documents` and `max_bytes`.

    Raises `DataError` for a missing file, a missing text key or a corpus that cannot be read.
    """
    left_bytes = options.max_bytes
    for document in islice(_all_documents(options), options.max_documents):
        if left_bytes is not None:
            size_bytes = document.measure()[0]
            if left_bytes == options.max_bytes and left_bytes < size_bytes:
                raise DataError(
                    f"data.max_bytes: the first document ({document.place}) has {size_bytes:,} bytes, all may have "
                    f"{left_bytes:,}; raise it, or cut the text into several documents"
                )
            left_bytes -= size_bytes
            if left_bytes < 0:
                return
        yield document


def text_pieces(options: DataOptions) -> Iterator[Iterator[str]]:
    """Yield the pieces of each document."""
    return (document.pieces() for document in documents(options))


def _all_documents(options: DataOptions) -> Iterator[Document]:
    if options.source == "python_stdlib":
        return (Document(str(path), path.read_text(encoding="utf-8", errors="ignore")) for path in _stdlib_files())
    if options.source == "text":
        return (Document(str(path), path) for path in find_files(options).files)
    return (Document(place, text) for place, text in row_texts(options))


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return [path for path in sorted(root.rglob("*.py")) if not LEFT_OUT_OF_STDLIB & set(path.relative_to(root).parts)]
