"""Building a token cache: made in a folder aside, where the next attempt finds what a killed one has done."""

import logging
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

from filelock import FileLock, Timeout

from skippipe.config.data_options import DataOptions
from skippipe.data.building.token_streams import TokenStreams
from skippipe.data.building.tokenising import OtherTextError, Tokenising
from skippipe.data.corpus_files import FileIdentity, file_identities
from skippipe.data.sources import text_pieces
from skippipe.data.token_cache_index import INDEX_FILE, CacheIndex
from skippipe.data.tokenizer import (
    TOKENIZER_FILE,
    Tokenizer,
    build_tokenizer,
    is_trained,
    load_trained,
    vocabulary_size,
)
from skippipe.errors import DataError

logger = logging.getLogger(__name__)
KEPT_S: Final = 7 * 24 * 3600.0
"""How long what a killed attempt has done waits for the next one."""


def build_cache(
    options: DataOptions,
    seed: int,
    folder: Path,
    files: list[FileIdentity],
    given: Tokenizer | None,
    model_vocab_size: int | None,
) -> None:
    """Write the cache of `options` aside and rename it to `folder`. Its lock must be held.

    What a killed attempt has done is gone on with. Where no tokenizer is given, one is trained.

    Raises `DataError` for an empty corpus, for one whose files are no longer `files` at the end, and for a token that a
    model of `model_vocab_size` rows does not have.
    """
    _clear_killed(folder.parent)
    aside = folder.with_name(f".{folder.name}.tmp")
    making, state = aside / "cache", aside / "state.json"
    try:
        try:
            _fill(making, state, options, seed, given, model_vocab_size)
        except OtherTextError as reason:
            logger.info("data: %s; the token cache is begun again", reason)
            shutil.rmtree(aside)
            _fill(making, state, options, seed, given, model_vocab_size)
        if changed := _first_change(files, file_identities(options)):
            shutil.rmtree(aside)
            raise DataError(f"data.paths: {changed}: was changed while its text was read; start again")
        making.rename(folder)
        state.unlink(missing_ok=True)
    finally:
        if not state.exists() and not (making / TOKENIZER_FILE).exists():
            shutil.rmtree(aside, ignore_errors=True)


def _clear_killed(root: Path) -> None:
    """Remove what attempts that were killed long ago left behind; whoever is at work holds the lock of its folder."""
    for aside in root.glob(".tokens-*.tmp"):
        lock = FileLock(root / f"{aside.name.split('.')[1]}.lock")
        with suppress(Timeout, OSError), lock.acquire(timeout=0):
            newest_s = max(path.stat().st_mtime for path in (aside, *aside.rglob("*")))
            if time.time() - newest_s > KEPT_S:
                shutil.rmtree(aside, ignore_errors=True)


def _fill(
    making: Path, state: Path, options: DataOptions, seed: int, given: Tokenizer | None, model_vocab_size: int | None
) -> None:
    """Write all files of a cache to the folder `making`."""
    making.mkdir(parents=True, exist_ok=True)
    tokenizer = given or _own_tokenizer(options, making)
    dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    with TokenStreams(making, state, dtype) as streams:
        Tokenising(options, seed, tokenizer, model_vocab_size, streams).write()
    if given is not None and is_trained(options):
        _save(given, making)
    (making / INDEX_FILE).unlink(missing_ok=True)
    CacheIndex.of_folder(
        making, tokenizer=options.tokenizer, vocab_size=tokenizer.vocab_size, dtype=dtype, tokens=streams.tokens
    ).write(making)


def _own_tokenizer(options: DataOptions, making: Path) -> Tokenizer:
    """Return the tokenizer that `options` name. One that is trained is kept at once: that cannot be gone on with."""
    if not is_trained(options):
        return build_tokenizer(options, ())
    if not (making / TOKENIZER_FILE).exists():
        _save(build_tokenizer(options, text_pieces(options)), making)
    return load_trained(making, options.tokenizer, vocabulary_size(options))


def _save(tokenizer: Tokenizer, making: Path) -> None:
    aside = making.with_name("tokenizer")
    aside.mkdir(exist_ok=True)
    tokenizer.save(aside)
    (aside / TOKENIZER_FILE).replace(making / TOKENIZER_FILE)


def _first_change(before: list[FileIdentity], after: list[FileIdentity]) -> str | None:
    """Return the name of the first file that was changed, taken away or added."""
    return next((str(file[0]) for file in (*before, *after) if file not in before or file not in after), None)
