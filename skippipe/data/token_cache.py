"""The token cache: a corpus tokenised once, stored as flat memory-mapped streams.

A cache folder holds `train.bin` and `validation.bin` (uint16 or uint32), `index.json` and, for a trained
encoding, `tokenizer.json`. Its name follows from the options, the seed and the files that they name (path, size, time
of change); its fingerprint from the tokens alone. It is made aside and renamed, so a folder with its final name is
complete, and the next attempt goes on with what a killed one has made.
"""

import hashlib
import json
import logging
import os
import platform
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from skippipe.config.data_options import DataOptions
from skippipe.data.building.token_cache_build import build_cache
from skippipe.data.building.tokenising import check_ids
from skippipe.data.corpus_files import FileIdentity, file_identities
from skippipe.data.token_cache_index import FORMAT, SPLITS, CacheIndex, Split
from skippipe.data.tokenizer import Tokenizer, build_tokenizer, is_trained, load_trained
from skippipe.errors import DataError, StorageError

logger = logging.getLogger(__name__)
NOTICEABLE_S = 5.0
"""Seconds of waiting for another process from which on that is said."""
BLOCK_TOKENS = 2**20
READING = 3
"""Which version of how text becomes tokens; a cache of another one is not used."""


@dataclass(frozen=True)
class TokenCache:
    """Tokens of both splits as flat read-only arrays, documents joined by the end-of-text token."""

    folder: Path
    train: NDArray[Any]
    validation: NDArray[Any]
    vocab_size: int
    fingerprint: str
    tokenizer: Tokenizer

    def split(self, name: Split) -> NDArray[Any]:
        """Return the tokens of "train" or "validation"."""
        tokens: NDArray[Any] = getattr(self, name)
        return tokens


def cache_root(options: DataOptions) -> Path:
    """Return the folder of all caches."""
    given = options.cache_dir or os.environ.get("SKIPPIPE_CACHE_DIR")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "skippipe"


def open_cache(
    options: DataOptions, seed: int, model_vocab_size: int | None = None, tokenizer: Tokenizer | None = None
) -> TokenCache:
    """Return the token cache of `options`, building it where there is none; safe when several processes call it.

    `tokenizer` stands in for the one that `options` name, or that would be trained.

    Raises `DataError` for an empty corpus, for a cache that was truncated or edited, and for tokens that a model of
    `model_vocab_size` rows does not have; `StorageError` where the folder cannot be written.
    """
    if tokenizer is None and not is_trained(options):
        tokenizer = build_tokenizer(options, ())
    files = file_identities(options)
    folder = _folder(options, seed, files, tokenizer)
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder):
                if not folder.exists():
                    build_cache(options, seed, folder, files, tokenizer, model_vocab_size)
        except OSError as reason:
            raise StorageError(f"{folder}: the token cache cannot be written ({reason.strerror or reason})") from None
    return _open(options, folder, tokenizer, model_vocab_size)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a cache; say where another process makes it meanwhile."""
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        lock.acquire(timeout=NOTICEABLE_S)
    except Timeout:
        logger.info("data: another process makes the token cache %s; waiting for it", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _folder(options: DataOptions, seed: int, files: list[FileIdentity], tokenizer: Tokenizer | None) -> Path:
    """Return the folder of a cache. One whose tokenizer was trained with it serves that tokenizer, too."""
    root = cache_root(options)
    if is_trained(options) and tokenizer is not None:
        trained = root / f"tokens-{_cache_key(options, seed, files, None)}"
        if (
            trained.exists()
            and load_trained(trained, options.tokenizer, tokenizer.vocab_size).digest == tokenizer.digest
        ):
            return trained
    return root / f"tokens-{_cache_key(options, seed, files, tokenizer)}"


def _cache_key(options: DataOptions, seed: int, files: list[FileIdentity], tokenizer: Tokenizer | None) -> str:
    identity: dict[str, Any] = options.model_dump(mode="json", exclude={"cache_dir", "same_on_all_hosts"})
    identity |= {"format": FORMAT, "reading": READING, "seed": seed}
    identity["digest"] = tokenizer.digest if tokenizer is not None else None
    identity["files"] = files
    if options.source == "python_stdlib":
        identity["python"] = [platform.python_version(), sysconfig.get_paths()["stdlib"]]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _open(options: DataOptions, folder: Path, given: Tokenizer | None, model_vocab_size: int | None) -> TokenCache:
    index = CacheIndex.read(folder, options.tokenizer)
    train, validation = (np.memmap(folder / f"{name}.bin", dtype=np.dtype(index.dtype), mode="r") for name in SPLITS)
    tokenizer = given or load_trained(folder, options.tokenizer, index.vocab_size)
    largest = np.array([_largest_id(folder / f"{name}.bin", index.dtype) for name in SPLITS], dtype=np.uint32)
    if largest.max() >= index.vocab_size:
        raise DataError(
            f"{folder}: has the token id {largest.max()}, its index.json says vocab_size {index.vocab_size}; "
            "delete the folder to build it again"
        )
    check_ids(largest, tokenizer, model_vocab_size, str(folder))
    return TokenCache(folder, train, validation, index.vocab_size, index.fingerprint, tokenizer)


def _largest_id(path: Path, dtype: str) -> int:
    """Return the largest token id of a file, which is read in blocks: of a mapped one all would stay in memory."""
    largest = 0
    with path.open("rb") as stream:
        while len(tokens := np.fromfile(stream, dtype, BLOCK_TOKENS)):
            largest = max(largest, int(tokens.max()))
    return largest
