"""The index of a token cache: what its files hold, and the check that they still hold it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from skippipe.errors import DataError

FORMAT: Literal["skippipe.tokens/2"] = "skippipe.tokens/2"
INDEX_FILE = "index.json"
Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


class CacheIndex(BaseModel):
    """Content of `index.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    format: Literal["skippipe.tokens/2"] = FORMAT
    tokenizer: str
    """Name of the tokenizer, as in the options."""
    vocab_size: int = Field(ge=1)
    dtype: Literal["uint16", "uint32"]
    """Type of the stored token ids."""
    tokens: dict[Split, int]
    """Tokens of each split."""
    sha256: dict[str, str]
    """Digest of every other file of the folder, by its name."""
    fingerprint: str
    """Identity of the tokens: the same on every machine that has the same text, wherever its files are."""

    @classmethod
    def of_folder(
        cls,
        folder: Path,
        *,
        tokenizer: str,
        vocab_size: int,
        dtype: Literal["uint16", "uint32"],
        tokens: dict[Split, int],
    ) -> Self:
        """Return the index of a folder whose other files are complete."""
        digests = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
        fingerprint = _fingerprint(vocab_size, dtype, tokens, digests)
        return cls.model_validate(
            {
                "tokenizer": tokenizer,
                "vocab_size": vocab_size,
                "dtype": dtype,
                "tokens": tokens,
                "sha256": digests,
                "fingerprint": fingerprint,
            }
        )

    @classmethod
    def read(cls, folder: Path, tokenizer: str) -> Self:
        """Read the index of `folder` and verify every file that it names.

        Raises `DataError`, which names the file, where one is missing, truncated or changed.
        """
        path, remedy = folder / INDEX_FILE, f"delete {folder} to build it again"
        try:
            index = cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValidationError) as reason:
            raise DataError(f"{path}: not a token cache index ({_first_line(reason)}); {remedy}") from None
        found = _fingerprint(index.vocab_size, index.dtype, index.tokens, index.sha256)
        if found != index.fingerprint or index.tokenizer != tokenizer:
            raise DataError(f"{path}: the token cache index was changed; {remedy}")
        missing = [split for split in SPLITS if not index.tokens.get(split) or f"{split}.bin" not in index.sha256]
        if missing:
            raise DataError(f"{path}: the token cache has no {missing[0]} tokens; {remedy}")
        index._verify(folder, remedy)
        return index

    def write(self, folder: Path) -> None:
        """Write `index.json` to `folder`."""
        (folder / INDEX_FILE).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    def _verify(self, folder: Path, remedy: str) -> None:
        item_bytes = {"uint16": 2, "uint32": 4}[self.dtype]
        for split, count in self.tokens.items():
            path = folder / f"{split}.bin"
            if not path.exists() or path.stat().st_size != count * item_bytes:
                raise DataError(f"{path}: the token cache is truncated, expected {count * item_bytes} bytes; {remedy}")
        for name, digest in self.sha256.items():
            if not (folder / name).exists() or _sha256(folder / name) != digest:
                raise DataError(f"{folder / name}: the token cache was changed; {remedy}")


def _fingerprint(vocab_size: int, dtype: str, tokens: Mapping[Any, int], digests: dict[str, str]) -> str:
    content = json.dumps([FORMAT, vocab_size, dtype, tokens, digests], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _first_line(reason: Exception) -> str:
    return (str(reason).splitlines() or [""])[0]
