"""Documents of a corpus, in an order that is the same on every machine."""

import glob
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from skippipe.config.data_options import DataOptions
from skippipe.errors import DataError

FILES_INSIDE = {"text": "*.txt", "jsonl": "*.jsonl", "parquet": "*.parquet"}
LEFT_OUT_OF_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


def documents(options: DataOptions) -> Iterator[str]:
    """Yield the documents that `options` describe, cut off at `max_documents` and `max_bytes`.

    Raises `DataError` for a missing file, a missing text key or a corpus that cannot be read.
    """
    left_bytes = options.max_bytes
    for text in islice(_all_documents(options), options.max_documents):
        if left_bytes is not None:
            size_bytes = len(text.encode())
            if size_bytes > left_bytes:
                return
            left_bytes -= size_bytes
        if text:
            yield text


def named_files(options: DataOptions) -> list[Path]:
    """Return the local files from which the tokens follow, sorted: the corpus, and a tokenizer's directory.

    Raises `DataError` for a missing file.
    """
    if options.source in FILES_INSIDE:
        files = local_files(options.paths, FILES_INSIDE[options.source])
    else:
        files = _files_below(options.dataset) if options.source == "huggingface" else []
    return files + _files_below(options.tokenizer)


def _files_below(directory: str | None) -> list[Path]:
    if directory is None or not Path(directory).is_dir():
        return []  # the name of something on the hub
    return sorted(path for path in Path(directory).rglob("*") if path.is_file())


def _all_documents(options: DataOptions) -> Iterator[str]:
    if options.source == "python_stdlib":
        return (path.read_text(encoding="utf-8", errors="ignore") for path in _stdlib_files())
    if options.source == "text":
        return (_read_text(path) for path in local_files(options.paths, FILES_INSIDE["text"]))
    return (_text_of(row, options) for row in _rows(options))


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return [path for path in sorted(root.rglob("*.py")) if not LEFT_OUT_OF_STDLIB & set(path.relative_to(root).parts)]


def local_files(patterns: tuple[str, ...], inside: str) -> list[Path]:
    """Return the files that `patterns` name, sorted; a directory stands for the files `inside` it."""
    found: list[Path] = []
    for pattern in patterns:
        whole = Path(pattern)
        matches = [whole] if whole.exists() else [Path(match) for match in glob.glob(pattern, recursive=True)]
        if not matches:
            raise DataError(f"data.paths: {pattern}: no such file; correct the path (seen from {Path.cwd()})")
        for match in matches:
            found += match.rglob(inside) if match.is_dir() else [match]
    if not found:
        raise DataError(f"data.paths: no {inside} files in {', '.join(patterns)}")
    return sorted(set(found))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as reason:
        raise DataError(f"data.paths: {path}: cannot be read as UTF-8 text ({reason})") from None


def _rows(options: DataOptions) -> Iterator[dict[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        if options.source == "huggingface":
            rows = _hub_rows(datasets, options)
        else:
            kind = {"jsonl": "json", "parquet": "parquet"}[options.source]
            files = [str(path) for path in local_files(options.paths, FILES_INSIDE[options.source])]
            rows = datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
        yield from rows
    except DataError:
        raise
    except Exception as reason:  # the library raises errors of many kinds for a bad file or a missing network
        place = options.dataset or ", ".join(options.paths)
        raise DataError(
            f"data: {place} cannot be read ({type(reason).__name__}: {_first_line(reason)}); "
            "check the name, the file's content and the network"
        ) from None


def _hub_rows(datasets: Any, options: DataOptions) -> Any:
    name = options.dataset or ""
    if (Path(name) / "dataset_info.json").exists() or (Path(name) / "dataset_dict.json").exists():
        stored = datasets.load_from_disk(name)
        return stored[options.split] if hasattr(stored, "keys") else stored
    return datasets.load_dataset(name, options.subset, split=options.split, streaming=True)


def _text_of(row: dict[str, Any], options: DataOptions) -> str:
    if options.text_key not in row:
        raise DataError(f"data.text_key: no key {options.text_key!r}; there are {', '.join(map(str, row))}: name one")
    text = row[options.text_key]
    if not isinstance(text, str):
        raise DataError(
            f"data.text_key: {options.text_key!r} holds {type(text).__name__}, expected text; name another key"
        )
    return text


def _first_line(reason: Exception) -> str:
    return (str(reason).splitlines() or [""])[0]
