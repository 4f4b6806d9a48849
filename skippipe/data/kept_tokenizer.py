"""The tokenizer that a run keeps in its directory: its weights are of no use with another one."""

import io
import logging
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

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
TOKENIZER: Final = "tokenizer"
"""Under which name processes give each other the packed tokenizer."""
MOST_BYTES: Final = 2**28
"""Of the files of a tokenizer that another host sends; those of published models take up to 40 MB."""
FILE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}")
"""Of such a file: plain, and not hidden."""


def keep_tokenizer(options: DataOptions, tokenizer: Tokenizer, run_dir: Path, *, anew: bool) -> None:
    """Write the tokenizer to `run_dir`. What a run that does not begin `anew` has otherwise is kept aside, and said.

    That of an imported run lies there from the start. Raises `StorageError` where it cannot be written.
    """
    inside = Path(options.tokenizer).resolve().is_relative_to(run_dir.resolve())
    if tokenizer.name == ByteTokenizer.name or inside:
        return
    _keep(run_dir, lambda aside: save_for_transformers(options, tokenizer, aside), anew=anew)


def _keep(run_dir: Path, write: Callable[[Path], None], *, anew: bool) -> None:
    folder = run_dir / FOLDER
    aside, former = run_dir / f".{FOLDER}.{os.getpid()}.tmp", run_dir / f"former-{FOLDER}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write(aside)
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


def packed_tokenizer(options: DataOptions, run_dir: Path) -> bytes:
    """Return the files of a run's tokenizer as a zip archive, for hosts that have it not.

    It is empty where none is needed, or none is there yet because it is trained on the text.
    """
    if options.tokenizer == ByteTokenizer.name:
        return b""
    folder = run_dir / FOLDER
    if folder.is_dir():
        return _packed(folder)
    if is_trained(options):
        return b""
    with tempfile.TemporaryDirectory() as written:
        save_for_transformers(options, build_tokenizer(options, ()), Path(written))
        return _packed(Path(written))


def _packed(folder: Path) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(path for path in folder.iterdir() if path.is_file() and FILE_NAME.fullmatch(path.name)):
            archive.write(path, path.name)
    return content.getvalue()


def unpack_tokenizer(content: bytes, run_dir: Path, *, anew: bool) -> None:
    """Write to `run_dir` what `packed_tokenizer` has made on another host; see `keep_tokenizer`.

    Raises `DataError` where it is damaged, or holds anything but plain files of a tokenizer's size.
    """
    if not content:
        return

    def write(aside: Path) -> None:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            files = archive.infolist()
            if sum(file.file_size for file in files) > MOST_BYTES or not all(
                FILE_NAME.fullmatch(file.filename) for file in files
            ):
                raise DataError(
                    f"the tokenizer that another host sent is no folder of plain files of {MOST_BYTES // 2**20} MiB at "
                    "most; see what data.tokenizer names there"
                )
            for file in files:
                (aside / file.filename).write_bytes(archive.read(file))

    try:
        _keep(run_dir, write, anew=anew)
    except (zipfile.BadZipFile, zlib.error, RuntimeError) as reason:  # the last: encrypted, or packed in another way
        raise DataError(f"the tokenizer that another host sent is damaged ({reason})") from None


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
