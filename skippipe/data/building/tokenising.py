"""A corpus becomes tokens, batch by batch on all cores, in the order of its documents."""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from skippipe.config.data_options import DataOptions
from skippipe.data.building.token_streams import CorpusPlace, TokenStreams
from skippipe.data.corpus_files import COMPRESSIONS, KINDS, ZSTANDARD, RemoteFile, find_files
from skippipe.data.long_work import TextProgress, one_ahead
from skippipe.data.sources import Document, documents
from skippipe.data.text_cutting import PART_CHARACTERS, TextPart
from skippipe.data.token_cache_index import SPLITS, Split
from skippipe.data.tokenizer import Tokenizer, Tokens
from skippipe.errors import DataError

logger = logging.getLogger(__name__)
PARTS_PER_CORE: Final = 4
"""Of a batch, so that all cores end it at about the same time."""
MOST_PARTS: Final = 64
"""Of a batch, however many cores there are: they need some 300 MB."""
PART_COST_CHARACTERS: Final = 100
"""What a part needs beside its text, as text."""


class OtherTextError(DataError):
    """The text is not the one that a killed attempt has read."""


class _Piece(NamedTuple):
    """A part of a document, and what becomes of its tokens."""

    part: TextPart
    document: Document
    split: Split
    place: CorpusPlace
    """Where the corpus is once it is written."""


@dataclass
class Tokenising:
    """The work of writing a corpus to streams, from their place on."""

    options: DataOptions
    seed: int
    tokenizer: Tokenizer
    model_vocab_size: int | None
    streams: TokenStreams

    def write(self) -> None:
        """Write the streams to their end.

        Raises `DataError` for an empty corpus, and `OtherTextError` where the text up to the place is not the one that
        is in the streams.
        """
        if self.streams.is_complete:
            return
        if self.streams.place.text:
            logger.info("data: going on with the token cache at document %s", f"{self.streams.place.document + 1:,}")
        with TextProgress("tokenising", _num_bytes(self.options)) as progress:
            batches = _batches(self._pieces(progress), _batch_characters())
            for batch, tokens in one_ahead(self._encode, batches):
                for piece, ids in zip(batch, tokens, strict=True):
                    check_ids(ids, self.tokenizer, self.model_vocab_size, piece.document.place)
                    self.streams.append(piece.split, ids)
                self.streams.reached(batch[-1].place)
                progress.add(sum(len(piece.part.text.encode()) for piece in batch), sum(map(len, tokens)))
        if sum(self.streams.tokens.values()) < len(SPLITS):
            raise DataError(
                f"data: the corpus ({self.options.source}) is empty; it has no text to train on: check its paths, "
                "and max_documents and max_bytes where given"
            )
        self.streams.complete(self.options.validation_fraction)

    def _encode(self, batch: list[_Piece]) -> list[Tokens]:
        return self.tokenizer.encode_parts([piece.part for piece in batch])

    def _pieces(self, progress: TextProgress) -> Iterator[_Piece]:
        """Yield the parts that are not written yet; those before them are only compared with what was read then."""
        begun, text, num_empty, number = self.streams.place, "", 0, -1
        for number, document in enumerate(documents(self.options)):
            size_bytes, digest = document.measure(f"{self.seed}/")
            text = hashlib.sha256(text.encode() + digest).hexdigest()
            num_empty += not size_bytes
            if number == begun.document and begun.text not in ("", text):
                break
            if number < begun.document or not size_bytes:
                progress.add_former(size_bytes)
                continue
            split = _split(digest, self.options.validation_fraction)
            for index, part in enumerate(self.tokenizer.parts(document.pieces())):
                if number == begun.document and index < begun.parts:
                    progress.add_former(len(part.text.encode()))
                else:
                    yield _Piece(part, document, split, CorpusPlace(document=number, parts=index + 1, text=text))
        else:
            if number >= begun.document or not begun.text:
                _say_what_was_read(self.options, number + 1, num_empty)
                return
        raise OtherTextError("the text is not the one that a killed attempt has read")


def check_ids(tokens: Tokens, tokenizer: Tokenizer, model_vocab_size: int | None, place: str) -> None:
    """Raise `DataError` for a token id that a model of `model_vocab_size` rows does not have."""
    largest = int(tokens.max(initial=0))
    if model_vocab_size is not None and largest >= model_vocab_size:
        raise DataError(
            f"{place}: token id {largest} ({tokenizer.decode([largest])!r}) of the tokenizer {tokenizer.name}, but the "
            f"model has {model_vocab_size} tokens; set model.options.vocab_size to {tokenizer.vocab_size} or more, or "
            "use the model's own tokenizer"
        )


def _split(digest: bytes, validation_fraction: float) -> Split:
    """Assign whole documents by their content, so that a document never changes sides."""
    return "validation" if int.from_bytes(digest[:4]) < validation_fraction * 2**32 else "train"


def _batch_characters() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return PART_CHARACTERS * min(cores * PARTS_PER_CORE, MOST_PARTS)


def _batches(pieces: Iterable[_Piece], characters: int) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.part.text) + PART_COST_CHARACTERS
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _num_bytes(options: DataOptions) -> int | None:
    """Return how much text there is, where that is known before it is read."""
    if options.source != "text":
        return None
    files = find_files(options).files[: options.max_documents]
    if any(path.suffix in {*COMPRESSIONS, ZSTANDARD} for path in files):
        return None
    sizes = [path.size_bytes if isinstance(path, RemoteFile) else path.stat().st_size for path in files]
    return None if None in sizes else min(sum(size or 0 for size in sizes), options.max_bytes or 2**63)


def _say_what_was_read(options: DataOptions, num_documents: int, num_empty: int) -> None:
    left_out = find_files(options).left_out if options.source in KINDS else []
    left_out += [f"{num_empty:,} documents without text"] if num_empty else []
    said = f"; left out: {', '.join(left_out)}" if left_out else ""
    logger.info("data: read %s documents%s", f"{num_documents:,}", said)
