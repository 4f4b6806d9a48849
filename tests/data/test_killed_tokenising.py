"""Tokenising that is killed goes on where it was, on any number of cores, and its cache is the same bit by bit."""

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from full_disk import largest_file
from processes import preloaded

from skippipe.config.data_options import DataOptions
from skippipe.data import text_cutting
from skippipe.data.building import token_streams, tokenising
from skippipe.data.building.token_streams import TokenStreams
from skippipe.data.text_cutting import TextPart
from skippipe.data.token_cache import open_cache
from skippipe.data.tokenizer import ByteTokenizer, Tokens
from skippipe.errors import DataError, StorageError

LONG = "".join(f"alle meine entchen {number} schwimmen auf dem see\n" for number in range(120))
SHORT = [line * 4 for line in LONG.splitlines()]


@contextmanager
def small_steps() -> Iterator[None]:
    """Make small batches, and save the place after each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_cutting, "PART_CHARACTERS", 600)
        patch.setattr(tokenising, "PART_CHARACTERS", 600)
        patch.setattr(tokenising, "MOST_PARTS", 2)
        patch.setattr(token_streams, "SAVE_EVERY_S", 0.0)
        yield


@pytest.fixture
def _small_steps() -> Iterator[None]:
    with small_steps():
        yield


def options(folder: Path, cache: str, source: str, tokenizer: str = "bpe:300") -> DataOptions:
    (folder / "corpus").mkdir(exist_ok=True)
    (folder / "corpus" / "a.txt").write_text(LONG)
    (folder / "corpus" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SHORT))
    content = {"source": source, "paths": [str(folder / "corpus")], "cache_dir": str(folder / cache)}
    return DataOptions.model_validate(content | {"tokenizer": tokenizer})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def attempt(given: DataOptions, last_save: int) -> None:
    """Make a cache, and die instead of saving the place for the `last_save`th time."""
    real, num_saves = TokenStreams._save, 0

    def save(streams: TokenStreams) -> None:
        nonlocal num_saves
        num_saves += 1
        if num_saves == last_save:
            os.kill(os.getpid(), signal.SIGKILL)
        real(streams)

    TokenStreams._save = save  # type: ignore[assignment,method-assign]  # to be killed in it
    with small_steps():
        open_cache(given, seed=0)


@pytest.mark.parametrize(
    ("source", "last_save", "validation_only"), [("jsonl", 9, False), ("text", 3, False), ("text", 4, True)]
)
def test_killed_again_and_again_it_goes_on(tmp_path: Path, source: str, last_save: int, validation_only: bool) -> None:
    fraction = {"validation_fraction": 0.999_999 if validation_only else 0.05}
    expected = open_cache(options(tmp_path, "whole", source).model_copy(update=fraction), seed=0)
    given = options(tmp_path, "cache", source).model_copy(update=fraction)
    codes: list[int | None] = []
    while not codes or codes[-1]:
        process = preloaded().Process(target=attempt, args=(given, last_save))
        process.start()
        process.join(30)
        codes.append(process.exitcode)
        assert len(codes) < 20
    assert set(codes[:-1]) == {-signal.SIGKILL}
    assert len(codes) > 2
    assert files(open_cache(given, seed=0).folder) == files(expected.folder)
    assert list((tmp_path / "cache").glob(".*")) == []


@pytest.mark.usefixtures("_small_steps")
@pytest.mark.parametrize("source", ["jsonl", "text"])
def test_the_number_of_cores_makes_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    many = open_cache(options(tmp_path, "many", source), seed=0)
    monkeypatch.setattr(tokenising, "MOST_PARTS", 1)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert files(open_cache(options(tmp_path, "one", source), seed=0).folder) == files(many.folder)


@pytest.mark.usefixtures("_small_steps")
def test_after_a_full_disk_it_goes_on(tmp_path: Path) -> None:
    given = options(tmp_path, "cache", "jsonl", "bytes")
    with largest_file(20_000), pytest.raises(StorageError, match=r"the token cache cannot be written \(File too large"):
        open_cache(given, seed=0)
    num_parts = []

    class Counting(ByteTokenizer):
        def encode_parts(self, parts: Sequence[TextPart]) -> list[Tokens]:
            num_parts.append(len(parts))
            return super().encode_parts(parts)

    found = files(open_cache(given, seed=0, tokenizer=Counting()).folder)
    assert found == files(open_cache(options(tmp_path, "whole", "jsonl", "bytes"), seed=0).folder)
    assert 0 < sum(num_parts) < len(SHORT)


@pytest.mark.usefixtures("_small_steps")
def test_another_text_behind_the_same_name_is_begun_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = options(tmp_path, "cache", "jsonl", "bytes")
    path = tmp_path / "corpus" / "a.jsonl"
    with largest_file(20_000), pytest.raises(StorageError):
        open_cache(given, seed=0)
    status = path.stat()
    path.write_text(path.read_text().replace("entchen 0 ", "gaense! 0 "))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with caplog.at_level("INFO"):
        cache = open_cache(given, seed=0)
    assert "the text is not the one that a killed attempt has read; the token cache is begun again" in caplog.text
    assert "gaense! 0 " in cache.tokenizer.decode([*cache.train, *cache.validation])


def test_a_file_that_changes_meanwhile_is_named(tmp_path: Path) -> None:
    given = options(tmp_path, "cache", "text", "bytes")
    path = tmp_path / "corpus" / "a.txt"

    class Disturbed(ByteTokenizer):
        def encode_parts(self, parts: Sequence[TextPart]) -> list[Tokens]:
            path.write_text(LONG + "more")
            return super().encode_parts(parts)

    with pytest.raises(DataError, match=r"a\.txt: was changed while its text was read; start again"):
        open_cache(given, seed=0, tokenizer=Disturbed())
    assert list((tmp_path / "cache").glob(".*")) == []
