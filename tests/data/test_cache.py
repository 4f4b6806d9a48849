"""Corpora of every kind become the same flat tokens; damaged caches are refused."""

import io
import json
import multiprocessing
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from skippipe.config.data_options import DataOptions
from skippipe.data.sources import documents
from skippipe.data.token_cache import open_cache
from skippipe.data.tokenizer import vocabulary_size
from skippipe.errors import DataError, StorageError

TEXTS = [f"Document {index}: " + "alle meine entchen schwimmen auf dem see. " * 5 + "grüße" for index in range(40)]


def corpus(tmp_path: Path, source: str) -> dict[str, object]:
    folder = tmp_path / source
    folder.mkdir()
    if source == "text":
        for index, text in enumerate(TEXTS):
            (folder / f"{index:03}.txt").write_text(text)
    elif source == "jsonl":
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    elif source == "parquet":
        pq.write_table(pa.table({"text": TEXTS}), folder / "a.parquet")
    elif source == "webdataset":
        for shard in range(2):
            with tarfile.open(folder / f"shard-{shard}.tar", "w") as archive:
                for index in range(shard * len(TEXTS) // 2, (shard + 1) * len(TEXTS) // 2):
                    _add(archive, f"{index:03}.txt", TEXTS[index])
                    _add(archive, f"{index:03}.json", json.dumps({"number": index}))
        return {"source": "huggingface", "dataset": str(folder), "text_key": "txt"}
    else:
        datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder)
        return {"source": source, "dataset": str(folder)}
    return {"source": source, "paths": [str(folder)]}


def _add(archive: tarfile.TarFile, name: str, text: str) -> None:
    content = text.encode()
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def texts_of(given: DataOptions) -> list[str]:
    return [document.text for document in documents(given)]


def options(tmp_path: Path, **given: object) -> DataOptions:
    return DataOptions.model_validate({"cache_dir": str(tmp_path / "cache"), "validation_fraction": 0.2, **given})


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "huggingface", "webdataset"])
def test_every_source_gives_the_same_tokens(tmp_path: Path, source: str) -> None:
    cache = open_cache(options(tmp_path, **corpus(tmp_path, source)), seed=3)
    assert cache.vocab_size == 257
    found = []
    for split in ("train", "validation"):
        pieces = np.split(cache.split(split), np.flatnonzero(cache.split(split) == 256) + 1)
        found += [cache.tokenizer.decode(piece) for piece in pieces if len(piece)]
    assert sorted(found) == sorted(TEXTS)
    assert 2 <= len(np.flatnonzero(cache.validation == 256)) <= 16


def test_standard_library_is_a_corpus(tmp_path: Path) -> None:
    texts = texts_of(options(tmp_path, source="python_stdlib"))
    assert texts == texts_of(options(tmp_path, source="python_stdlib"))
    assert sum(len(text.encode()) for text in texts) > 5_000_000
    limited = texts_of(options(tmp_path, source="python_stdlib", max_bytes=3_000_000))
    assert limited == texts[: len(limited)]
    assert 2_500_000 < sum(len(text.encode()) for text in limited) <= 3_000_000
    assert sum("import" in text for text in texts) > len(texts) / 2


def test_limits_cut_the_corpus(tmp_path: Path) -> None:
    given = corpus(tmp_path, "text")
    assert texts_of(options(tmp_path, **given, max_documents=3)) == TEXTS[:3]
    assert len(texts_of(options(tmp_path, **given, max_bytes=500))) == 500 // len(TEXTS[0].encode())


def test_second_opening_reads_the_stored_tokens(tmp_path: Path) -> None:
    given = options(tmp_path, **corpus(tmp_path, "text"))
    first = open_cache(given, seed=0)
    written_ns = (first.folder / "train.bin").stat().st_mtime_ns
    assert (open_cache(given, seed=0).folder / "train.bin").stat().st_mtime_ns == written_ns
    assert open_cache(given, seed=1).folder != first.folder
    (tmp_path / "text" / "000.txt").write_text("changed")
    assert open_cache(given, seed=0).folder != first.folder


def test_fingerprint_follows_the_text_and_not_its_place(tmp_path: Path) -> None:
    first = options(tmp_path, **corpus(tmp_path, "text"))
    (tmp_path / "other").mkdir()
    elsewhere = options(tmp_path, **corpus(tmp_path / "other", "text"))
    a, b = open_cache(first, seed=0), open_cache(elsewhere, seed=0)
    assert a.folder != b.folder
    assert a.fingerprint == b.fingerprint
    assert a.fingerprint != open_cache(first, seed=1).fingerprint


def test_changed_local_dataset_is_tokenised_again(tmp_path: Path) -> None:
    given = options(tmp_path, **corpus(tmp_path, "huggingface"))
    before = len(open_cache(given, seed=0).train)
    shutil.rmtree(tmp_path / "huggingface")
    datasets.Dataset.from_dict({"text": TEXTS[:9]}).save_to_disk(tmp_path / "huggingface")
    assert len(open_cache(given, seed=0).train) < before


def test_one_large_document_gives_its_end_to_validation(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("abcdefghij" * 100)
    cache = open_cache(options(tmp_path, source="text", paths=[str(tmp_path / "one.txt")]), seed=0)
    assert (len(cache.train), len(cache.validation)) == (801, 200)
    text = cache.tokenizer.decode([*cache.train, *cache.validation])
    assert text == "abcdefghij" * 100


def test_trained_encoding_is_reproducible_and_round_trips(tmp_path: Path) -> None:
    given = corpus(tmp_path, "text")
    caches = [open_cache(options(tmp_path / name, **given, tokenizer="bpe:300"), seed=0) for name in ("a", "b")]
    assert np.array_equal(caches[0].train, caches[1].train)
    assert caches[0].vocab_size == vocabulary_size(options(tmp_path, **given, tokenizer="bpe:300")) == 300
    assert caches[0].tokenizer.decode(caches[0].tokenizer.encode("schwimmen grüße 東")) == "schwimmen grüße 東"
    assert len(caches[0].train) < sum(len(text.encode()) for text in TEXTS) / 2
    reopened = open_cache(options(tmp_path / "a", **given, tokenizer="bpe:300"), seed=0)
    assert np.array_equal(reopened.tokenizer.encode(TEXTS[0]), caches[0].tokenizer.encode(TEXTS[0]))


def _build(given: DataOptions, results: "multiprocessing.Queue[str]") -> None:
    results.put(str(open_cache(given, seed=0).folder))


def test_processes_that_start_together_share_one_build(tmp_path: Path) -> None:
    given = options(tmp_path, source="python_stdlib", max_bytes=1_000_000)
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=_build, args=(given, results)) for _ in range(3)]
    for process in processes:
        process.start()
    folders = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(folders) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name.endswith(".tmp")] == []


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "train.bin").write_bytes(b"12"), "truncated"),
        (lambda folder: (folder / "train.bin").unlink(), "truncated"),
        (lambda folder: _flip(folder / "validation.bin"), "was changed"),
        (lambda folder: (folder / "index.json").write_text("{}"), "not a token cache index"),
        (lambda folder: (folder / "index.json").unlink(), "not a token cache index"),
        (lambda folder: _edit(folder / "index.json", "vocab_size", 7), "index was changed"),
        (lambda folder: _edit(folder / "index.json", "tokens", {}), "index was changed"),
        (lambda folder: _edit(folder / "index.json", "dtype", "int8"), "not a token cache index"),
        (lambda folder: _edit(folder / "tokenizer.json", "decoder", None), "tokenizer.json.* was changed"),
    ],
)
def test_damaged_cache_is_refused(tmp_path: Path, damage: object, expected: str) -> None:
    given = options(tmp_path, **corpus(tmp_path, "text"), tokenizer="bpe:300")
    damage(open_cache(given, seed=0).folder)  # type: ignore[operator]
    with pytest.raises(DataError, match=rf"{expected}.*delete"):
        open_cache(given, seed=0)


def _edit(path: Path, key: str, value: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"source": "text", "paths": ["nowhere/*.txt"]}, "no such file"),
        ({"source": "text", "paths": ["EMPTY"]}, "no \\*.txt files"),
        ({"source": "text", "paths": ["BLANK"]}, "is empty"),
        ({"source": "jsonl", "paths": ["JSONL"], "text_key": "content"}, "no key 'content'; there are text"),
        ({"source": "jsonl", "paths": ["BROKEN"]}, "cannot be read"),
        ({"source": "text", "paths": ["BLANK"], "tokenizer": "bpe:100"}, "more than 256"),
        ({"source": "text", "paths": ["BLANK"], "tokenizer": "NOWHERE/x"}, "cannot be loaded"),
        ({"source": "huggingface", "dataset": "NOWHERE/x"}, "NOWHERE/x cannot be read.*check the name"),
        (
            {"source": "text", "paths": ["JSONL"], "max_bytes": 3},
            "max_bytes: the first .*JSONL. has 14 bytes, all may have 3;",
        ),
    ],
)
def test_mistakes_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, object], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable was read at import
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BLANK").write_text("")
    (tmp_path / "JSONL").write_text('{"text": "a"}\n')
    (tmp_path / "BROKEN").write_text("{not json\n")
    with pytest.raises(DataError, match=expected):
        open_cache(options(tmp_path, **given), seed=0)


def test_cache_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="cannot be written"):
        open_cache(options(tmp_path, **corpus(tmp_path, "text")), seed=0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"source": "jsonl"}, "needs paths"),
        ({"source": "huggingface"}, "needs dataset"),
        ({"source": "python_stdlib", "tokenizer": "bpe:many"}, "bpe:SIZE"),
    ],
)
def test_options_say_what_is_missing(given: dict[str, object], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        DataOptions.model_validate(given)
