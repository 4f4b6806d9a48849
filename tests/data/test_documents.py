"""What of a corpus becomes which tokens: as users of transformers and datasets expect, or refused with the place."""

import gzip
import io
import json
import logging
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path

import fsspec
import library_tokenizers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from skippipe.config.data_options import DataOptions
from skippipe.data import text_cutting
from skippipe.data.building.token_cache_build import KEPT_S
from skippipe.data.corpus_files import find_files
from skippipe.data.sources import documents
from skippipe.data.token_cache import TokenCache, open_cache
from skippipe.data.token_cache_index import CacheIndex
from skippipe.data.tokenizer import ByteTokenizer, build_tokenizer, document_tokens
from skippipe.errors import DataError


def options(folder: Path, source: str = "text", **given: object) -> DataOptions:
    content = {"source": source, "paths": [str(folder / "corpus")], "cache_dir": str(folder / "cache")}
    return DataOptions.model_validate(content | given)


def corpus(folder: Path, **files: bytes) -> Path:
    (folder / "corpus").mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / "corpus" / name.replace("__", ".")).write_bytes(content)
    return folder / "corpus"


def texts(given: DataOptions) -> list[str]:
    return [document.text for document in documents(given)]


def all_tokens(cache: TokenCache) -> list[int]:
    return [*cache.train.tolist(), *cache.validation.tolist()]


def test_marks_and_line_ends_of_windows_are_no_text(tmp_path: Path) -> None:
    corpus(tmp_path, a__txt=b"\xef\xbb\xbfone\r\ntwo", b__txt="\ufefféü".encode())
    assert texts(options(tmp_path)) == ["one\ntwo", "éü"]
    corpus(tmp_path, c__jsonl=b'\xef\xbb\xbf{"text": "three"}\r\n\r\n{"text": "four"}\r\n')
    assert texts(options(tmp_path, "jsonl")) == ["three", "four"]


def test_compressed_files_are_read(tmp_path: Path) -> None:
    corpus(tmp_path, a__jsonl__gz=gzip.compress(b'{"text": "one"}\n'), b__jsonl=b'{"text": "two"}\n')
    corpus(tmp_path, c__txt__gz=gzip.compress(b"three"))
    assert texts(options(tmp_path, "jsonl")) == ["one", "two"]
    assert texts(options(tmp_path, "text")) == ["three"]
    corpus(tmp_path, d__txt__gz=gzip.compress(b"four" * 99)[:-20])
    with pytest.raises(DataError, match=r"d\.txt\.gz: cannot be read as UTF-8 text \(Compressed file ended"):
        texts(options(tmp_path))


def test_links_are_followed_once_and_the_rest_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = corpus(tmp_path, a__txt=b"one", readme__md=b"no", b__txt=b"")
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "c.txt").write_text("two")
    (disk / "back").symlink_to(folder)
    (folder / "more").symlink_to(disk)
    (folder / "same.txt").symlink_to(folder / "a.txt")
    with caplog.at_level(logging.INFO):
        cache = open_cache(options(tmp_path), seed=0)
    assert sorted(bytes(t for t in all_tokens(cache) if t < 256)) == sorted(b"onetwo")
    assert (
        "read 3 documents; left out: 1 files of other kinds (.md), 1 links to files that are read already, "
        "1 documents without text"
    ) in caplog.text


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (b'{"text": "a"}\n{"text": null}\n', r"b\.jsonl: line 2: 'text' holds null"),
        (b'{"text": "a"}\n\n{"text": 7}\n', r"b\.jsonl: line 3: 'text' holds int"),
        (b'{"text": "a"}\n{"id": 1}\n', r"b\.jsonl: line 2: no key 'text'; there are id"),
        (b'{"text": "a"}\n["b"]\n', r"b\.jsonl: line 2: holds list, expected one object"),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', r"b\.jsonl: line 2: 'text': character 1 is '\\ud800', which has no"),
        (b'{"text": ' + b"9" * 5000 + b"}\n", r"b\.jsonl: line 1: cannot be read as JSON"),
        (b'{"text": "\xff"}\n', r"b\.jsonl: cannot be read as UTF-8"),
    ],
)
def test_a_row_without_text_is_named(tmp_path: Path, lines: bytes, expected: str) -> None:
    corpus(tmp_path, a__jsonl=b'{"text": "first"}\n', b__jsonl=lines)
    with pytest.raises(DataError, match=expected):
        texts(options(tmp_path, "jsonl"))


@pytest.mark.parametrize(
    ("column", "expected"),
    [(["a", None], r"b\.parquet: row 2: 'text' holds null"), ([1, 2], r"b\.parquet: row 1: 'text' holds int")],
)
def test_a_parquet_row_without_text_is_named(tmp_path: Path, column: list[object], expected: str) -> None:
    corpus(tmp_path)
    pq.write_table(pa.table({"text": ["first"]}), tmp_path / "corpus" / "a.parquet")
    pq.write_table(pa.table({"text": column}), tmp_path / "corpus" / "b.parquet")
    with pytest.raises(DataError, match=expected):
        texts(options(tmp_path, "parquet"))
    with pytest.raises(DataError, match=r"a\.parquet: no key 'content'; there are text"):
        texts(options(tmp_path, "parquet", text_key="content"))


@pytest.mark.parametrize("given", [{}, {"bos": True}, {"chat": True}, {"bos": True, "chat": True}])
def test_documents_have_the_tokens_of_transformers(tmp_path: Path, given: dict[str, bool]) -> None:
    library = library_tokenizers.byte_level(tmp_path / "library", **given)
    text = "river stone <|im_start|>user\nquiet<|im_end|>\n"
    corpus(tmp_path, a__txt=text.encode(), b__txt=b"green")
    stored = all_tokens(open_cache(options(tmp_path, tokenizer=str(tmp_path / "library")), seed=0))
    expected = [[*library(one)["input_ids"], library.eos_token_id] for one in (text, "green")]
    assert stored == list(chain.from_iterable(expected))


def test_a_spelled_first_or_last_token_is_not_doubled(tmp_path: Path) -> None:
    library = library_tokenizers.byte_level(tmp_path / "library", bos=True, chat=True)
    ours = build_tokenizer(options(tmp_path, tokenizer=str(tmp_path / "library")), ())
    tokens = np.concatenate(list(document_tokens(ours, ["<bos>green<|im_end|>"]))).tolist()
    assert tokens == library("<bos>green<|im_end|>", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["byte_level", "prepended"])
def test_long_documents_are_cut_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(text_cutting, "PART_CHARACTERS", 900)
    library = getattr(library_tokenizers, kind)(tmp_path / "library")
    ours = build_tokenizer(options(tmp_path, tokenizer=str(tmp_path / "library")), ())
    generator = np.random.default_rng(0)
    words = [*" ".join(library_tokenizers.LINES[:3]).split(" "), "\n", "\n\n", "", "", "river", "<|endoftext|>"]
    text = " ".join(generator.choice(words, 3000))
    found = list(document_tokens(ours, (text[first : first + 137] for first in range(0, len(text), 137))))
    assert len(found) > 10
    assert np.concatenate(found).tolist() == [*library(text)["input_ids"], library.eos_token_id]


def test_a_text_without_a_place_to_cut_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_cutting, "PART_CHARACTERS", 500)
    assert list(text_cutting.parts(["x" * 3000])) == ["x" * 3000]


@pytest.mark.parametrize(("last_id", "dtype"), [(900, "uint16"), (65_535, "uint16"), (65_536, "uint32")])
def test_ids_behind_a_gap_are_kept(tmp_path: Path, last_id: int, dtype: str) -> None:
    library = library_tokenizers.byte_level(tmp_path / "library", last_id=last_id)
    corpus(tmp_path, a__txt=b"quiet vv green " * 9)
    given = options(tmp_path, tokenizer=str(tmp_path / "library"))
    cache = open_cache(given, seed=0, model_vocab_size=last_id + 1)
    assert (cache.vocab_size, cache.train.dtype.name) == (last_id + 1, dtype)
    assert all_tokens(cache)[:-1] == library("quiet vv green " * 9)["input_ids"]
    with pytest.raises(DataError, match=rf"token id {last_id} .* but the model has {last_id} tokens; set"):
        open_cache(given, seed=0, model_vocab_size=last_id)
    with pytest.raises(DataError, match=rf"a\.txt: token id {last_id} "):
        open_cache(given, seed=1, model_vocab_size=last_id)


@pytest.mark.parametrize(
    ("train", "validation", "expected"),
    [
        ([1, 2], [], "has no validation tokens; delete"),
        ([1, 300], [2], "has the token id 300, its index.json says vocab_size 257; delete"),
    ],
)
def test_a_cache_made_by_hand_is_checked(
    tmp_path: Path, train: list[int], validation: list[int], expected: str
) -> None:
    corpus(tmp_path, a__txt=b"one two")
    folder = open_cache(options(tmp_path), seed=0).folder
    for name, tokens in (("train", train), ("validation", validation)):
        np.asarray(tokens, dtype=np.uint16).tofile(folder / f"{name}.bin")
    (folder / "index.json").unlink()
    CacheIndex.of_folder(
        folder,
        tokenizer="bytes",
        vocab_size=ByteTokenizer.vocab_size,
        dtype="uint16",
        tokens={"train": len(train), "validation": len(validation)},
    ).write(folder)
    with pytest.raises(DataError, match=expected):
        open_cache(options(tmp_path), seed=0)


def test_a_split_that_the_index_leaves_out_is_missed(tmp_path: Path) -> None:
    corpus(tmp_path, a__txt=b"one two")
    folder = open_cache(options(tmp_path), seed=0).folder
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").unlink()
    CacheIndex.of_folder(
        folder, tokenizer="bytes", vocab_size=257, dtype="uint16", tokens={"train": index["tokens"]["train"]}
    ).write(folder)
    with pytest.raises(DataError, match="has no validation tokens"):
        open_cache(options(tmp_path), seed=0)


def test_what_killed_attempts_left_is_removed_after_a_week(tmp_path: Path) -> None:
    corpus(tmp_path, a__txt=b"one two")
    root = tmp_path / "cache"
    for name in ("dead", "busy", "young"):
        (root / f".tokens-{name}.tmp").mkdir(parents=True)
        age_s = 0.9 * KEPT_S if name == "young" else 1.1 * KEPT_S
        os.utime(root / f".tokens-{name}.tmp", (time.time() - age_s,) * 2)
    with FileLock(root / "tokens-busy.lock"):
        open_cache(options(tmp_path), seed=0)
    assert sorted(path.name for path in root.glob(".tokens-*.tmp")) == [".tokens-busy.tmp", ".tokens-young.tmp"]


def test_shards_named_by_urls_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    table = io.BytesIO()
    pq.write_table(pa.table({"text": ["five", "six"]}), table)
    memory = fsspec.filesystem("memory")
    files = {
        "b.jsonl": b'\xef\xbb\xbf{"text": "three"}\n{"text": "four"}\n',
        "a.jsonl.gz": gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'),
        "c.parquet": table.getvalue(),
    }
    for name, content in files.items():
        memory.pipe(f"/shards/{name}", content)
    try:
        lines = options(tmp_path, "jsonl", paths=["memory://shards"])
        assert texts(lines) == ["one", "two", "three", "four"]
        assert find_files(lines).left_out == ["1 files of other kinds (.parquet)"]
        assert texts(options(tmp_path, "jsonl", paths=["memory://shards/[b]*"])) == ["three", "four"]
        assert texts(options(tmp_path, "parquet", paths=["memory://shards/c.parquet"])) == ["five", "six"]
        with pytest.raises(DataError, match=r"memory://shards/d\.jsonl: no such file"):
            texts(options(tmp_path, "jsonl", paths=["memory://shards/d.jsonl"]))
        before = open_cache(lines, seed=0)
        memory.pipe("/shards/b.jsonl", b'{"text": "another"}\n')
        assert open_cache(lines, seed=0).fingerprint != before.fingerprint
    finally:
        memory.rm("/shards", recursive=True)


class _Shards(BaseHTTPRequestHandler):
    """A web server that sends whole files only; of one of them it says more than it sends."""

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(b'{"text": "one"}\n{"text": "two"}\n')

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(32 + 9 * self.path.startswith("/cut")))
        self.end_headers()
        self.wfile.write(content)


def test_shards_of_a_web_server_are_streamed_and_one_that_is_cut_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads https with it")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Shards) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            root = f"http://127.0.0.1:{server.server_address[1]}"
            assert texts(options(tmp_path, "jsonl", paths=[f"{root}/whole.jsonl"])) == ["one", "two"]
            with pytest.raises(DataError, match=r"cut\.jsonl: cannot be read"):
                texts(options(tmp_path, "jsonl", paths=[f"{root}/cut.jsonl"]))
        finally:
            server.shutdown()
    with pytest.raises(DataError, match=r"whole\.jsonl: no such file \(Cannot connect to host"):
        texts(options(tmp_path, "jsonl", paths=[f"{root}/whole.jsonl"]))
