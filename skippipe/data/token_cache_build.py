"""Building a token cache: documents become tokens, part by part, in two flat streams."""

import logging
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from filelock import FileLock, Timeout

from skippipe.config.data_options import DataOptions
from skippipe.data.corpus_files import COMPRESSIONS, KINDS, ZSTANDARD, RemoteFile, find_files
from skippipe.data.long_work import TextProgress
from skippipe.data.sources import Document, documents, text_pieces
from skippipe.data.token_cache_index import SPLITS, CacheIndex, Split
from skippipe.data.tokenizer import Tokenizer, Tokens, build_tokenizer, is_trained
from skippipe.errors import DataError

logger = logging.getLogger(__name__)


def build_cache(
    options: DataOptions, seed: int, folder: Path, given: Tokenizer | None, model_vocab_size: int | None
) -> None:
    """Write the cache of `options` aside and rename it to `folder`. Its lock must be held.

    Where no tokenizer is given, one is trained.

    Raises `DataError` for an empty corpus, and for a token that a model of `model_vocab_size` rows does not have.
    """
    _clear_killed(folder.parent)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        tokenizer = given or build_tokenizer(options, text_pieces(options))
        counts = _Writing(options, seed, tokenizer, model_vocab_size).write(aside)
        if is_trained(options):
            tokenizer.save(aside)
        index = CacheIndex.of_folder(
            aside,
            tokenizer=options.tokenizer,
            vocab_size=tokenizer.vocab_size,
            dtype=_dtype(tokenizer),
            tokens=counts,
        )
        index.write(aside)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_ids(tokens: Tokens, tokenizer: Tokenizer, model_vocab_size: int | None, place: str) -> None:
    """Raise `DataError` for a token id that a model of `model_vocab_size` rows does not have."""
    largest = int(tokens.max(initial=0))
    if model_vocab_size is not None and largest >= model_vocab_size:
        raise DataError(
            f"{place}: token id {largest} ({tokenizer.decode([largest])!r}) of the tokenizer {tokenizer.name}, but the "
            f"model has {model_vocab_size} tokens; set model.options.vocab_size to {tokenizer.vocab_size} or more, or "
            "use the model's own tokenizer"
        )


def _clear_killed(root: Path) -> None:
    """Remove what attempts that were killed left behind; whoever is at work holds the lock of its folder."""
    for aside in root.glob(".tokens-*.tmp"):
        lock = FileLock(root / f"{aside.name.split('.')[1]}.lock")
        with suppress(Timeout, OSError), lock.acquire(timeout=0):
            shutil.rmtree(aside, ignore_errors=True)


@dataclass
class _Writing:
    options: DataOptions
    seed: int
    tokenizer: Tokenizer
    model_vocab_size: int | None

    def write(self, folder: Path) -> dict[Split, int]:
        """Write both streams and return their tokens."""
        counts = dict.fromkeys(SPLITS, 0)
        num_documents = num_empty = 0
        with (
            (folder / "train.bin").open("wb") as train,
            (folder / "validation.bin").open("wb") as validation,
            TextProgress("tokenising", _num_bytes(self.options)) as progress,
        ):
            streams: dict[Split, BinaryIO] = {"train": train, "validation": validation}
            for document in documents(self.options):
                size_bytes, digest = document.measure(f"{self.seed}/")
                num_documents += 1
                if not size_bytes:
                    num_empty += 1
                    continue
                split = self._split(digest)
                counts[split] += self._append(document, progress, streams[split])
        if sum(counts.values()) < len(SPLITS):
            raise DataError(
                f"data: the corpus ({self.options.source}) is empty; it has no text to train on: check its paths, "
                "and max_documents and max_bytes where given"
            )
        _say_what_was_read(self.options, num_documents, num_empty)
        if 0 in counts.values():
            (folder / ("train.bin" if counts["train"] else "validation.bin")).replace(folder / "train.bin")
            item_bytes = np.dtype(_dtype(self.tokenizer)).itemsize
            return _hold_out_tail(folder, sum(counts.values()), self.options.validation_fraction, item_bytes)
        return counts

    def _split(self, digest: bytes) -> Split:
        """Assign whole documents by their content, so that a document never changes sides."""
        return "validation" if int.from_bytes(digest[:4]) < self.options.validation_fraction * 2**32 else "train"

    def _append(self, document: Document, progress: TextProgress, stream: BinaryIO) -> int:
        count = 0
        for tokens in self.tokenizer.document(progress.over(document.pieces())):
            check_ids(tokens, self.tokenizer, self.model_vocab_size, document.place)
            stream.write(tokens.astype(_dtype(self.tokenizer)).tobytes())
            count += len(tokens)
        return count


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


def _hold_out_tail(folder: Path, num_tokens: int, fraction: float, item_bytes: int) -> dict[Split, int]:
    """Move the end of the training tokens to validation: a corpus of a few large documents has none to hold out."""
    held_out = max(1, int(num_tokens * fraction))
    kept = num_tokens - held_out
    with (folder / "train.bin").open("r+b") as train, (folder / "validation.bin").open("wb") as validation:
        train.seek(kept * item_bytes)
        shutil.copyfileobj(train, validation)
        train.truncate(kept * item_bytes)
    return {"train": kept, "validation": held_out}


def _dtype(tokenizer: Tokenizer) -> Literal["uint16", "uint32"]:
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
