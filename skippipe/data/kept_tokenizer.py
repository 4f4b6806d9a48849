"""The tokenizer that a run keeps in its directory: its weights are of no use with another one."""

import logging
import os
import shutil
from pathlib import Path

from skippipe.config.data_options import DataOptions
from skippipe.data.token_cache import open_cache
from skippipe.data.tokenizer import (
    TOKENIZER_FILE,
    ByteTokenizer,
    Tokenizer,
    build_tokenizer,
    is_trained,
    load_trained,
    save_for_transformers,
    vocabulary_size,
)
from skippipe.errors import DataError, StorageError

logger = logging.getLogger(__name__)
FOLDER = "tokenizer"


def keep_tokenizer(options: DataOptions, tokenizer: Tokenizer, run_dir: Path, *, anew: bool) -> None:
    """Write the tokenizer to `run_dir`. What a run that does not begin `anew` has otherwise is kept aside, and said.

    That of an imported run lies there from the start. Raises `StorageError` where it cannot be written.
    """
    folder = run_dir / FOLDER
    inside = Path(options.tokenizer).resolve().is_relative_to(run_dir.resolve())
    if tokenizer.name == ByteTokenizer.name or inside:
        return
    aside, former = run_dir / f".{FOLDER}.{os.getpid()}.tmp", run_dir / f"former-{FOLDER}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_for_transformers(options, tokenizer, aside)
        if folder.is_dir() and not anew:
            differing = _difference(aside, folder)
            if not differing:
                return
            shutil.rmtree(former, ignore_errors=True)
            folder.rename(former)
            logger.warning(
                "%s: not what the run trains with (%s); written again, what was there is kept as %s",
                folder,
                differing,
                former.name,
            )
        elif not anew:
            logger.warning("%s: missing; written again", folder)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except OSError as reason:
        raise StorageError(f"{folder}: cannot be written ({reason.strerror or reason})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _difference(expected: Path, found: Path) -> str:
    """Return the first file of `expected` that is missing in `found` or has another content there, "" where none is."""
    for path in sorted(expected.iterdir()):
        other = found / path.name
        if not other.is_file():
            return f"{path.name} is missing"
        if other.read_bytes() != path.read_bytes():
            return f"{path.name} differs"
    return ""


def kept_options(options: DataOptions, run_dir: Path | None) -> DataOptions:
    """Return `options` with the tokenizer of Hugging Face that a run keeps, in place of its name."""
    if run_dir is None or options.tokenizer == ByteTokenizer.name or is_trained(options):
        return options
    folder = run_dir / FOLDER
    return options.model_copy(update={"tokenizer": str(folder)}) if folder.is_dir() else options


def kept_tokenizer(options: DataOptions, run_dir: Path | None) -> Tokenizer | None:
    """Return the tokenizer of a run or of a directory without its corpus.

    None where it was trained on that, by a version that did not keep it. Raises `DataError` for one that is damaged.
    """
    if not is_trained(options):
        return build_tokenizer(kept_options(options, run_dir), ())
    folder = (run_dir or Path()) / FOLDER
    if run_dir is None or not folder.is_dir():
        return None
    return load_trained(folder, options.tokenizer, vocabulary_size(options))


def tokenizer_of_run(options: DataOptions, seed: int, run_dir: Path | None, fingerprint: str | None) -> Tokenizer:
    """Return the tokenizer of a run whose checkpoint says that it was trained on tokens of `fingerprint`.

    Raises `DataError` where the run did not keep it and it cannot be had from the corpus any more.
    """
    kept = kept_tokenizer(options, run_dir)
    if kept is not None:
        return kept
    cache = open_cache(options, seed)
    if fingerprint not in (None, cache.fingerprint):
        raise DataError(
            f"{run_dir}: has no {FOLDER}/{TOKENIZER_FILE}, and the corpus is not the one that run and tokenizer "
            f"({options.tokenizer}) were trained on; put that corpus back"
        )
    return cache.tokenizer
