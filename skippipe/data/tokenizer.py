"""Tokenizers: bytes, a byte-pair encoding trained on the corpus, or one of Hugging Face."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from skippipe.data.options import DataOptions
from skippipe.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as BpeModel

Tokens = NDArray[np.uint32]
END_OF_TEXT = "<|endoftext|>"
NUM_BYTES = 256


class Tokenizer(Protocol):
    """Text to token ids and back; `eos_id` separates documents."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...

    @property
    def eos_id(self) -> int:
        """Id of the token between documents."""
        ...

    def encode(self, text: str) -> Tokens:
        """Return the token ids of `text`, shape (tokens,)."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of token ids."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8 text and an end of text."""

    vocab_size = NUM_BYTES + 1
    eos_id = NUM_BYTES

    def encode(self, text: str) -> Tokens:
        """See `Tokenizer`."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def decode(self, tokens: Iterable[int]) -> str:
        """See `Tokenizer`; ids beyond the bytes are left out."""
        return bytes(token for token in tokens if token < NUM_BYTES).decode(errors="replace")


@dataclass(frozen=True)
class LibraryTokenizer:
    """A tokenizer of the `tokenizers` library, trained here or loaded."""

    model: "BpeModel"
    vocab_size: int
    eos_id: int

    def encode(self, text: str) -> Tokens:
        """See `Tokenizer`."""
        return np.asarray(self.model.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def decode(self, tokens: Iterable[int]) -> str:
        """See `Tokenizer`."""
        text: str = self.model.decode([int(token) for token in tokens])
        return text


def vocabulary_size(options: DataOptions) -> int:
    """Return the vocabulary that the model needs, without reading the corpus."""
    if options.tokenizer == "bytes":
        return ByteTokenizer.vocab_size
    if options.tokenizer.startswith("bpe:"):
        return _bpe_size(options)
    return _pretrained(options.tokenizer).vocab_size


def build_tokenizer(options: DataOptions, corpus: Iterator[str]) -> Tokenizer:
    """Return the tokenizer that `options` name; `corpus` is read only where one is to be trained."""
    if options.tokenizer == "bytes":
        return ByteTokenizer()
    if options.tokenizer.startswith("bpe:"):
        return _train_bpe(_bpe_size(options), corpus)
    return _pretrained(options.tokenizer)


def load_trained(path: Path, vocab_size: int) -> Tokenizer:
    """Read a tokenizer that `save_trained` wrote."""
    from tokenizers import Tokenizer as BpeModel

    try:
        model = BpeModel.from_str(path.read_text(encoding="utf-8"))
    except Exception as reason:  # the library raises bare Exception
        raise DataError(f"{path}: not a tokenizer ({reason}); delete its folder to build it again") from None
    return LibraryTokenizer(model, vocab_size, model.token_to_id(END_OF_TEXT))


def save_trained(tokenizer: Tokenizer, path: Path) -> None:
    """Write a trained tokenizer beside the tokens it made."""
    if isinstance(tokenizer, LibraryTokenizer):
        path.write_text(json.dumps(json.loads(tokenizer.model.to_str())), encoding="utf-8")


def _bpe_size(options: DataOptions) -> int:
    size = int(options.tokenizer.removeprefix("bpe:"))
    if size <= NUM_BYTES:
        raise DataError(
            f"data.tokenizer: {options.tokenizer}: a byte-level encoding needs more than {NUM_BYTES} tokens"
        )
    return size


def _train_bpe(vocab_size: int, corpus: Iterator[str]) -> Tokenizer:
    from tokenizers import Tokenizer as BpeModel
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = BpeModel(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(corpus, trainer)
    return LibraryTokenizer(model, vocab_size, model.token_to_id(END_OF_TEXT))


def _pretrained(name: str) -> LibraryTokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as reason:  # missing network, missing files and bad files raise errors of many kinds
        first_line = (str(reason).splitlines() or [""])[0]
        raise DataError(f"data.tokenizer: {name!r} cannot be loaded ({first_line})") from None
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise DataError(f"data.tokenizer: {name!r} has no fast tokenizer (tokenizer.json)")
    if tokenizer.eos_token_id is None:
        raise DataError(f"data.tokenizer: {name!r} has no end-of-text token to put between documents")
    return LibraryTokenizer(tokenizer.backend_tokenizer, len(tokenizer), tokenizer.eos_token_id)
