"""Rows of JSON lines, Parquet and datasets of the hub, each with the place that messages name."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from skippipe.config.data_options import DataOptions
from skippipe.data.corpus_files import CorpusFile, find_files, open_binary, open_text
from skippipe.data.hub import hub_problem_for
from skippipe.errors import DataError

ROWS_AT_ONCE = 1024


def row_texts(options: DataOptions) -> Iterator[tuple[str, str]]:
    """Yield (place, text) of every row; the place is a file and its line or row, from 1 on.

    Raises `DataError` for what cannot be read, and for a row without text, naming the place.
    """
    key = options.text_key
    if options.source == "huggingface":
        rows = _hub_rows(options)
    else:
        read = {"jsonl": _json_rows, "parquet": _parquet_rows}[options.source]
        rows = (row for path in find_files(options).files for row in read(path, key))
    for place, row in rows:
        yield place, _text_of(row, key, place)


def _json_rows(path: CorpusFile, _: str) -> Iterator[tuple[str, Any]]:
    with open_text(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = f"{path}: line {number:,}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as reason:
                raise DataError(f"data.paths: {place}: cannot be read as JSON ({reason})") from None
            if not isinstance(row, dict):
                raise DataError(f"data.paths: {place}: holds {type(row).__name__}, expected one object a line")
            yield place, row


def _parquet_rows(path: CorpusFile, key: str) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with open_binary(path) as content, ParquetFile(content) as file:
            if key not in file.schema_arrow.names:
                yield str(path), dict.fromkeys(file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[key]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield f"{path}: row {number:,}", {key: text}
    except (OSError, ArrowException) as reason:
        raise DataError(f"data.paths: {path}: cannot be read as Parquet ({_first_line(reason)})") from None


def _hub_rows(options: DataOptions) -> Iterator[tuple[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        for number, row in enumerate(_dataset(datasets, options), start=1):
            yield f"{options.dataset}: row {number:,}", row
    except DataError:
        raise
    except Exception as reason:  # the library raises errors of many kinds for a bad file or a missing network
        why = hub_problem_for(options.dataset or "") or f"{type(reason).__name__}: {_first_line(reason)}"
        raise DataError(
            f"data: {options.dataset} cannot be read ({why}); check the name, the file's content and the network"
        ) from None


def _dataset(datasets: Any, options: DataOptions) -> Any:
    name = options.dataset or ""
    if (Path(name) / "dataset_info.json").exists() or (Path(name) / "dataset_dict.json").exists():
        stored = datasets.load_from_disk(name)
        return stored[options.split] if hasattr(stored, "keys") else stored
    if hub_problem_for(name) is not None:
        datasets.config.HF_HUB_OFFLINE = True
    return datasets.load_dataset(name, options.subset, split=options.split, revision=options.revision, streaming=True)


def _text_of(row: dict[str, Any], key: str, place: str) -> str:
    if key not in row:
        raise DataError(f"data.text_key: {place}: no key {key!r}; there are {', '.join(map(str, row))}: name one")
    text = row[key]
    if not isinstance(text, str):
        holds = "null" if text is None else type(text).__name__
        raise DataError(
            f"data.text_key: {place}: {key!r} holds {holds}, expected text; name another key, or take the row out"
        )
    if not text.isascii():
        check_unicode(text, f"data.text_key: {place}: {key!r}")
    return text


def check_unicode(text: str, place: str) -> None:
    """Raise `DataError` for a text that has no UTF-8: half of a surrogate pair, or bytes of another encoding."""
    try:
        text.encode()
    except UnicodeEncodeError as reason:
        found = repr(text[reason.start])
        raise DataError(f"{place}: character {reason.start + 1:,} is {found}, which has no UTF-8") from None


def _first_line(reason: Exception) -> str:
    return (str(reason).splitlines() or [""])[0]
