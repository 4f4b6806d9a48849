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
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from skippipe.config.data_options import DataOptions
from skippipe.data.sources import documents, named_files
from skippipe.data.token_cache_index import FORMAT, CacheIndex, Split
from skippipe.data.tokenizer import Tokenizer, build_tokenizer, is_trained, load_trained
from skippipe.errors import DataError, StorageError

SPLITS: tuple[Split, ...] = ("train", "validation")


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


def open_cache(options: DataOptions, seed: int) -> TokenCache:
    """Return the token cache of `options`, building it where there is none; safe when several processes call it.

    Raises `DataError` for an empty corpus and for a cache that was truncated or edited, `StorageError` where the
    folder cannot be written.
    """
    folder = cache_root(options) / f"tokens-{_cache_key(options, seed)}"
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_suffix(".lock")):
                if not folder.exists():
                    _build(options, seed, folder)
        except OSError as reason:
            raise StorageError(f"{folder}: the token cache cannot be written ({reason.strerror or reason})") from None
    return _open(options, folder)


def _cache_key(options: DataOptions, seed: int) -> str:
    identity: dict[str, Any] = options.model_dump(mode="json", exclude={"cache_dir"})
    identity |= {"format": FORMAT, "seed": seed}
    identity["files"] = [_file_identity(path) for path in named_files(options)]
    if options.source == "python_stdlib":
        identity["python"] = [platform.python_version(), sysconfig.get_paths()["stdlib"]]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _file_identity(path: Path) -> list[str | int]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _build(options: DataOptions, seed: int, folder: Path) -> None:
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        tokenizer = build_tokenizer(options, documents(options))
        counts = _write_streams(options, seed, tokenizer, aside)
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


def _write_streams(options: DataOptions, seed: int, tokenizer: Tokenizer, folder: Path) -> dict[Split, int]:
    dtype = np.dtype(_dtype(tokenizer))
    counts = dict.fromkeys(SPLITS, 0)
    with (folder / "train.bin").open("wb") as train, (folder / "validation.bin").open("wb") as validation:
        streams = {"train": train, "validation": validation}
        for split, text in _split(options, seed):
            tokens = np.append(tokenizer.encode(text), np.uint32(tokenizer.eos_id)).astype(dtype)
            streams[split].write(tokens.tobytes())
            counts[split] += len(tokens)
    if sum(counts.values()) < len(SPLITS):
        raise DataError(
            f"data: the corpus ({options.source}) is empty; it has no text to train on: check its paths, "
            "and max_documents and max_bytes where given"
        )
    if 0 in counts.values():
        (folder / ("train.bin" if counts["train"] else "validation.bin")).replace(folder / "train.bin")
        return _hold_out_tail(folder, sum(counts.values()), options.validation_fraction, dtype.itemsize)
    return counts


def _split(options: DataOptions, seed: int) -> Iterator[tuple[Split, str]]:
    """Assign whole documents by their content, so that a document never changes sides."""
    threshold = options.validation_fraction * 2**32
    for text in documents(options):
        digest = hashlib.sha256(f"{seed}/".encode() + text.encode()).digest()
        yield ("validation" if int.from_bytes(digest[:4]) < threshold else "train"), text


def _hold_out_tail(folder: Path, num_tokens: int, fraction: float, item_bytes: int) -> dict[Split, int]:
    """Move the end of the training tokens to validation: a corpus of a few large documents has none to hold out."""
    held_out = max(1, int(num_tokens * fraction))
    kept = num_tokens - held_out
    with (folder / "train.bin").open("r+b") as train:
        train.seek(kept * item_bytes)
        (folder / "validation.bin").write_bytes(train.read())
        train.truncate(kept * item_bytes)
    return {"train": kept, "validation": held_out}


def _dtype(tokenizer: Tokenizer) -> Literal["uint16", "uint32"]:
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


def _open(options: DataOptions, folder: Path) -> TokenCache:
    index = CacheIndex.read(folder, options.tokenizer)
    train, validation = (np.memmap(folder / f"{name}.bin", dtype=np.dtype(index.dtype), mode="r") for name in SPLITS)
    if is_trained(options):
        tokenizer = load_trained(folder, options.tokenizer, index.vocab_size)
    else:
        tokenizer = build_tokenizer(options, iter(()))
    return TokenCache(folder, train, validation, index.vocab_size, index.fingerprint, tokenizer)
