"""The streams of a token cache while they are written: a killed attempt is gone on with where it saved its place."""

import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from skippipe.data.token_cache_index import SPLITS, Split
from skippipe.data.tokenizer import Tokens
from skippipe_scheduler.files import replace_file

SAVE_EVERY_S = 5.0
"""How much work a kill costs at most, beside the batches that are in work."""


class CorpusPlace(BaseModel):
    """How far a corpus is in the streams."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    document: int = Field(default=0, ge=0)
    """Number of the document that is in work; all before it are done."""
    parts: int = Field(default=0, ge=0)
    """How many parts of it are done."""
    text: str = ""
    """Digest of the text of all documents up to this one."""


class _SavedStreams(CorpusPlace):
    """Content of the file beside the streams."""

    train: int = Field(default=0, ge=0)
    """Tokens of the stream; what its file holds beyond them was written after this."""
    validation: int = Field(default=0, ge=0)
    is_complete: bool = False


class TokenStreams:
    """The files `train.bin` and `validation.bin` of a folder; `saved` is the file that says how far they are.

    Its methods raise `OSError` where they cannot be written.
    """

    def __init__(self, folder: Path, saved: Path, dtype: Literal["uint16", "uint32"]) -> None:
        """Go on with the streams of `folder`; where nothing, or more than is there, was saved, begin them."""
        self._paths = {split: folder / f"{split}.bin" for split in SPLITS}
        self._saved, self._dtype = saved, np.dtype(dtype)
        state = self._read()
        if state == _SavedStreams():
            saved.unlink(missing_ok=True)
        self.place = CorpusPlace(document=state.document, parts=state.parts, text=state.text)
        self.is_complete = state.is_complete
        self.tokens: dict[Split, int] = {"train": state.train, "validation": state.validation}
        self._saved_s = time.monotonic()
        with ExitStack() as opened:
            self._files = {split: opened.enter_context(self._open(split)) for split in SPLITS}
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.close()

    def append(self, split: Split, tokens: Tokens) -> None:
        """Append tokens to a stream."""
        self._files[split].write(tokens.astype(self._dtype).tobytes())
        self.tokens[split] += len(tokens)

    def reached(self, place: CorpusPlace) -> None:
        """Take down how far the corpus is in the streams; save it where that was not done for some time."""
        self.place = place
        if self._is_due():
            self._save()

    def complete(self, validation_fraction: float) -> None:
        """Take down that the whole corpus is in the streams. Where one is empty it gets the end of the other one."""
        if not self.tokens["train"]:
            self._move("validation", 0, "train")
        if not self.tokens["validation"]:
            held_out = max(1, int(self.tokens["train"] * validation_fraction))
            self._move("train", self.tokens["train"] - held_out, "validation")
        self.is_complete = True
        self._save_unless_young()

    def _move(self, source: Split, first: int, target: Split) -> None:
        """Move the tokens of a stream from the `first` on: copied, saved, and only then taken away."""
        start, file = first * self._dtype.itemsize, self._files[source]
        file.seek(start)
        shutil.copyfileobj(file, self._files[target])
        self.tokens[target] += self.tokens[source] - first
        self.tokens[source] = first
        self._save_unless_young()
        file.seek(start)
        file.truncate()

    def _read(self) -> _SavedStreams:
        try:
            state = _SavedStreams.model_validate_json(self._saved.read_bytes())
            sizes = {split: path.stat().st_size for split, path in self._paths.items()}
        except (FileNotFoundError, ValidationError):
            return _SavedStreams()
        counts: dict[Split, int] = {"train": state.train, "validation": state.validation}
        whole = all(sizes[split] >= count * self._dtype.itemsize for split, count in counts.items())
        return state if whole else _SavedStreams()

    def _open(self, split: Split) -> BinaryIO:
        self._paths[split].touch()
        file = self._paths[split].open("r+b")
        file.seek(self.tokens[split] * self._dtype.itemsize)
        file.truncate()
        return file

    def _is_due(self) -> bool:
        return time.monotonic() - self._saved_s >= SAVE_EVERY_S

    def _save_unless_young(self) -> None:
        """Save, but for streams that were never saved: they are made again as quickly."""
        if self._saved.exists() or self._is_due():
            self._save()

    def _save(self) -> None:
        """Say on the disk how far the streams are, once that is there."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        state = _SavedStreams.model_validate(self.place.model_dump() | self.tokens | {"is_complete": self.is_complete})
        replace_file(self._saved, state.model_dump_json().encode())
        self._saved_s = time.monotonic()
