"""Tokenizers give back every text; none drops the end of a document or splits one."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from transformers import PreTrainedTokenizerFast

from skippipe.config.data_options import DataOptions
from skippipe.data.tokenizer import END_OF_TEXT, ByteTokenizer, Tokenizer, build_tokenizer, load_trained
from skippipe.errors import DataError

TEXTS = ["alle meine entchen schwimmen auf dem see " * 20, "köpfchen in das wasser " * 20]


def tokenizer_of(name: str) -> Tokenizer:
    return build_tokenizer(DataOptions(source="python_stdlib", tokenizer=name), [[text] for text in TEXTS])


TRAINED = tokenizer_of("bpe:300")


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), TRAINED], ids=["bytes", "bpe"])
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert all(token < tokenizer.vocab_size and token != tokenizer.eos_id for token in tokens)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), TRAINED], ids=["bytes", "bpe"])
def test_text_that_spells_the_end_of_text_does_not_end(tokenizer: Tokenizer) -> None:
    text = f"before {END_OF_TEXT} after"
    assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.decode([*tokenizer.encode(text), tokenizer.eos_id]) == text


def test_training_twice_gives_the_same_encoding() -> None:
    assert np.array_equal(tokenizer_of("bpe:300").encode(TEXTS[1]), TRAINED.encode(TEXTS[1]))
    assert len(TRAINED.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_saved_encoding_reads_back(tmp_path: Path) -> None:
    TRAINED.save(tmp_path)
    loaded = load_trained(tmp_path, "bpe:300", 300)
    assert (loaded.name, loaded.vocab_size, loaded.eos_id) == (TRAINED.name, 300, TRAINED.eos_id)
    text = f"{TEXTS[1]} {END_OF_TEXT}"
    assert np.array_equal(loaded.encode(text), TRAINED.encode(text))


def test_saved_bytes_are_a_hugging_face_tokenizer_with_the_same_ids(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    library = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token=END_OF_TEXT)
    text = "".join(map(chr, range(300))) + "grüße 東"
    assert library(text)["input_ids"] == ByteTokenizer().encode(text).tolist()
    assert (len(library), library.eos_token_id) == (257, 256)


def test_hugging_face_directory_encodes_whole_documents(tmp_path: Path) -> None:
    TRAINED.save(tmp_path)
    library = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token=END_OF_TEXT)
    library.backend_tokenizer.enable_truncation(8)
    library.save_pretrained(tmp_path / "stored")
    found = tokenizer_of(str(tmp_path / "stored"))
    assert found.vocab_size == len(library)
    assert np.array_equal(found.encode(TEXTS[0]), TRAINED.encode(TEXTS[0]))


def test_tokenizer_without_end_of_text_is_refused(tmp_path: Path) -> None:
    TRAINED.save(tmp_path)
    PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")).save_pretrained(tmp_path / "stored")
    with pytest.raises(DataError, match="no end-of-text token"):
        tokenizer_of(str(tmp_path / "stored"))


def test_damaged_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json: not a tokenizer.*delete"):
        load_trained(tmp_path, "bpe:300", 300)
