"""Tokenizers: bytes, a byte-pair encoding trained on the corpus, or one of Hugging Face."""

import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from skippipe.config.data_options import DataOptions
from skippipe.data.hub import pretrained_tokenizer
from skippipe.data.long_work import SAY_EVERY_S, TextProgress, in_a_thread
from skippipe.data.text_cutting import TextPart, marked, parts
from skippipe.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as BpeModel, models

logger = logging.getLogger(__name__)
Tokens = NDArray[np.uint32]
TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
NUM_BYTES = 256
TRAINING_CHARACTERS = 2**11
"""How much text the library takes in training as one: of 256 of them at once, it looks at all before it ends."""


class Tokenizer(Protocol):
    """Text to token ids and back; `eos_id` separates documents."""

    @property
    def name(self) -> str:
        """The tokenizer as the options name it."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id; some published tokenizers have gaps below it."""
        ...

    @property
    def eos_id(self) -> int:
        """Id of the token between documents."""
        ...

    @property
    def digest(self) -> str:
        """Identity of what it does: the same for a copy of its files."""
        ...

    def encode(self, text: str) -> Tokens:
        """Return the token ids of `text` alone, shape (tokens,)."""
        ...

    def parts(self, pieces: Iterable[str]) -> Iterator[TextPart]:
        """Cut a document, whose text comes in any pieces, where it makes no difference to its tokens."""
        ...

    def encode_parts(self, parts: Sequence[TextPart]) -> list[Tokens]:
        """Return the token ids of parts of any documents, shape (tokens,) each, computed on all cores.

        A first part begins with the tokens that the tokenizer's files ask for, a last one ends with `eos_id`.
        """
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of token ids; the end of text is left out."""
        ...

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, which the libraries of Hugging Face read, to `folder`."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8 text and an end of text."""

    name = "bytes"
    vocab_size = NUM_BYTES + 1
    eos_id = NUM_BYTES
    digest = "bytes"

    def encode(self, text: str) -> Tokens:
        """See `Tokenizer`."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def parts(self, pieces: Iterable[str]) -> Iterator[TextPart]:
        """See `Tokenizer`."""
        return marked(pieces)

    def encode_parts(self, parts: Sequence[TextPart]) -> list[Tokens]:
        """See `Tokenizer`; on one core, as writing takes longer."""
        end = np.array([self.eos_id], dtype=np.uint32)
        return [np.concatenate([self.encode(part.text), end[: part.is_last]]) for part in parts]

    def decode(self, tokens: Iterable[int]) -> str:
        """See `Tokenizer`; ids beyond the bytes are left out."""
        return bytes(token for token in tokens if token < NUM_BYTES).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """See `Tokenizer`; the file holds a byte-level encoding without merges, whose ids are the same."""
        from tokenizers import AddedToken, models

        model = _byte_level(models.BPE(vocab=byte_names(), merges=[]))
        model.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
        _save(model, folder)


@dataclass(frozen=True)
class LibraryTokenizer:
    """A tokenizer of the `tokenizers` library, trained here or loaded."""

    name: str
    model: "BpeModel"
    vocab_size: int
    eos_id: int

    @cached_property
    def digest(self) -> str:
        """See `Tokenizer`."""
        return hashlib.sha256(f"{self.eos_id} {self.model.to_str()}".encode()).hexdigest()[:16]

    def encode(self, text: str) -> Tokens:
        """See `Tokenizer`."""
        return np.asarray(self._ids(text), dtype=np.uint32)

    def parts(self, pieces: Iterable[str]) -> Iterator[TextPart]:
        """See `Tokenizer`."""
        return marked(parts(pieces, self._ids))

    def encode_parts(self, parts: Sequence[TextPart]) -> list[Tokens]:
        """See `Tokenizer`; a text that spells its first or last special token gets no second one."""
        texts = [part.text for part in parts]
        encodings = self.model.encode_batch_fast(texts, add_special_tokens=False)
        return [self._framed(part, encoding.ids) for part, encoding in zip(parts, encodings, strict=True)]

    def _framed(self, part: TextPart, ids: list[int]) -> Tokens:
        before, after = self._around
        end = after if after[-1:] == [self.eos_id] else [*after, self.eos_id]
        if part.is_first and ids[:1] != before[-1:]:
            ids = [*before, *ids]
        if part.is_last:
            ids = [*ids, *(end[1:] if ids[-1:] == end[:1] else end)]
        return np.asarray(ids, dtype=np.uint32)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.model.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer's files put before and after every text."""
        with_them: list[int] = self.model.encode("a").ids
        alone = self._ids("a")
        first = next((at for at in range(len(with_them)) if with_them[at : at + len(alone)] == alone), 0)
        return with_them[:first], with_them[first + len(alone) :]

    def decode(self, tokens: Iterable[int]) -> str:
        """See `Tokenizer`."""
        text: str = self.model.decode([int(token) for token in tokens])
        return text

    def save(self, folder: Path) -> None:
        """See `Tokenizer`."""
        _save(self.model, folder)


def document_tokens(tokenizer: Tokenizer, pieces: Iterable[str]) -> Iterator[Tokens]:
    """Yield the token ids of a document, whose text comes in any pieces, part by part, shape (tokens,) each."""
    for part in tokenizer.parts(pieces):
        yield from tokenizer.encode_parts([part])


def is_trained(options: DataOptions) -> bool:
    """Return whether the tokenizer is trained on the corpus, and so has to be kept beside the tokens."""
    return options.tokenizer.startswith("bpe:")


def vocabulary_size(options: DataOptions) -> int:
    """Return the vocabulary that the model needs, without reading the corpus."""
    if options.tokenizer == "bytes":
        return ByteTokenizer.vocab_size
    if is_trained(options):
        return _bpe_size(options)
    return _pretrained(options.tokenizer).vocab_size


def build_tokenizer(options: DataOptions, corpus: Iterable[Iterable[str]]) -> Tokenizer:
    """Return the tokenizer that `options` name; `corpus`, the pieces of each document, is read to train one."""
    if options.tokenizer == "bytes":
        return ByteTokenizer()
    if is_trained(options):
        return _train_bpe(options.tokenizer, _bpe_size(options), corpus)
    return _pretrained(options.tokenizer)


def save_for_transformers(options: DataOptions, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer to `folder` so that `AutoTokenizer.from_pretrained` loads it, with its special tokens."""
    from transformers import PreTrainedTokenizerFast

    if tokenizer.name == ByteTokenizer.name or is_trained(options):
        tokenizer.save(folder)
        file = str(folder / TOKENIZER_FILE)
        PreTrainedTokenizerFast(tokenizer_file=file, eos_token=END_OF_TEXT).save_pretrained(folder)
    else:
        pretrained_tokenizer(options.tokenizer).save_pretrained(folder)


def load_trained(folder: Path, name: str, vocab_size: int) -> Tokenizer:
    """Read the `tokenizer.json` of a trained tokenizer that was saved to `folder`."""
    from tokenizers import Tokenizer as BpeModel

    path = folder / TOKENIZER_FILE
    try:
        model = BpeModel.from_str(path.read_text(encoding="utf-8"))
    except Exception as reason:  # the library raises bare Exception
        raise DataError(f"{path}: not a tokenizer ({reason}); delete its folder to build it again") from None
    if _highest_id(model) >= vocab_size:
        raise DataError(f"{path}: has the token id {_highest_id(model)}, {vocab_size} tokens were expected")
    return _trained(name, model, vocab_size)


def _trained(name: str, model: "BpeModel", vocab_size: int) -> LibraryTokenizer:
    model.encode_special_tokens = True  # a document that spells the end-of-text token must not end there
    return _library_tokenizer(name, model, vocab_size, model.token_to_id(END_OF_TEXT))


def _highest_id(model: "BpeModel") -> int:
    return max(model.get_vocab().values(), default=-1)


def _library_tokenizer(name: str, model: "BpeModel", vocab_size: int, eos_id: int | None) -> LibraryTokenizer:
    if eos_id is None:
        raise DataError(f"data.tokenizer: {name!r} has no end-of-text token to put between documents; name another one")
    model.no_truncation()  # a stored maximum length would drop the rest of a document
    model.no_padding()
    return LibraryTokenizer(name, model, vocab_size, eos_id)


def _save(model: "BpeModel", folder: Path) -> None:
    (folder / TOKENIZER_FILE).write_text(model.to_str(), encoding="utf-8")


def byte_names() -> dict[str, int]:
    """Return the character that a byte-level encoding writes for each byte (GPT-2, Radford et al. 2019, 2.2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(NUM_BYTES) if byte not in printable]
    names = {chr(byte): byte for byte in printable}
    return names | {chr(NUM_BYTES + index): byte for index, byte in enumerate(others)}


def _bpe_size(options: DataOptions) -> int:
    size = int(options.tokenizer.removeprefix("bpe:"))
    if size <= NUM_BYTES:
        raise DataError(
            f"data.tokenizer: {options.tokenizer}: a byte-level encoding needs more than {NUM_BYTES} tokens"
        )
    return size


def _byte_level(bpe: "models.BPE") -> "BpeModel":
    from tokenizers import Tokenizer as BpeModel, decoders, pre_tokenizers

    model = BpeModel(bpe)
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return model


def _train_bpe(name: str, vocab_size: int, corpus: Iterable[Iterable[str]]) -> Tokenizer:
    from tokenizers import models, pre_tokenizers, trainers

    model = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with TextProgress(f"training the tokenizer {name}") as progress:
        text = chain.from_iterable(parts(progress.over(pieces), characters=TRAINING_CHARACTERS) for pieces in corpus)
        in_a_thread(lambda watched: model.train_from_iterator(_said_at_the_end(watched, name), trainer), text)
    return _trained(name, model, vocab_size)


def _said_at_the_end(text: Iterable[str], name: str) -> Iterator[str]:
    start_s = time.monotonic()
    yield from text
    if time.monotonic() - start_s > SAY_EVERY_S:
        logger.info("training the tokenizer %s: all text is read, choosing tokens", name)


def _pretrained(name: str) -> LibraryTokenizer:
    tokenizer = pretrained_tokenizer(name)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise DataError(f"data.tokenizer: {name!r} has no fast tokenizer (tokenizer.json)")
    model = tokenizer.backend_tokenizer  # encodes special tokens that a text spells, such as a chat's, as such
    return _library_tokenizer(name, model, _highest_id(model) + 1, tokenizer.eos_token_id)
