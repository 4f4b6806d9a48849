"""The token cache: a corpus tokenised once, stored as flat memory-mapped streams.

A cache folder holds `train.bin` and `validation.bin` (uint16 or uint32), `index.json` and, for a trained
encoding, `tokenizer.json`. Its name follows from the options, the seed and the files that they name (path, size, time
of change); its fingerprint from the tokens alone. It is written aside and renamed, so a folder with its final name is
complete.
"""

import hashlib
import json
import os
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from skippipe.config.data_options import DataOptions
from skippipe.data.corpus_files import named_files
from skippipe.data.token_cache_build import build_cache, check_ids
from skippipe.data.token_cache_index import FORMAT, SPLITS, CacheIndex, Split
from skippipe.data.tokenizer import Tokenizer, build_tokenizer, is_trained, load_trained
from skippipe.errors import DataError, StorageError

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


def open_cache(options: DataOptions, seed: int, model_vocab_size: int | None = None) -> TokenCache:
    """Return the token cache of `options`, building it where there is none; safe when several processes call it.

    Raises `DataError` for an empty corpus, for a cache that was truncated or edited, and for tokens that a model of
    `model_vocab_size` rows does not have; `StorageError` where the folder cannot be written.
    """
    folder = cache_root(options) / f"tokens-{_cache_key(options, seed)}"
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_suffix(".lock")):
                if not folder.exists():
                    build_cache(options, seed, folder, model_vocab_size)
        except OSError as reason:
            raise StorageError(f"{folder}: the token cache cannot be written ({reason.strerror or reason})") from None
    return _open(options, folder, model_vocab_size)


def _cache_key(options: DataOptions, seed: int) -> str:
    identity: dict[str, Any] = options.model_dump(mode="json", exclude={"cache_dir"})
    identity |= {"format": FORMAT, "reading": READING, "seed": seed}
    identity["files"] = [_file_identity(path) for path in named_files(options)]
    if options.source == "python_stdlib":
        identity["python"] = [platform.python_version(), sysconfig.get_paths()["stdlib"]]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _file_identity(path: Path) -> list[str | int]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _open(options: DataOptions, folder: Path, model_vocab_size: int | None) -> TokenCache:
    index = CacheIndex.read(folder, options.tokenizer)
    train, validation = (np.memmap(folder / f"{name}.bin", dtype=np.dtype(index.dtype), mode="r") for name in SPLITS)
    if is_trained(options):
        tokenizer = load_trained(folder, options.tokenizer, index.vocab_size)
    else:
        tokenizer = build_tokenizer(options, ())
    for tokens in (train, validation):
        if tokens.max() >= index.vocab_size:
            raise DataError(
                f"{folder}: has the token id {tokens.max()}, its index.json says vocab_size {index.vocab_size}; "
                "delete the folder to build it again"
            )
        check_ids(tokens, tokenizer, model_vocab_size, str(folder))
    return TokenCache(folder, train, validation, index.vocab_size, index.fingerprint, tokenizer)
