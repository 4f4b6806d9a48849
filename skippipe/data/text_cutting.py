"""Long texts cut where it makes no difference: the tokens of the parts are those of the whole.

Tokenizers need twenty times the memory of a text, and cannot be interrupted in it.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Final, NamedTuple

PART_CHARACTERS: Final = 2**17
"""From how many characters on a text is cut."""
CONTEXT_CHARACTERS: Final = 200
"""How much text on either side of a cut must have the same tokens with it as without."""
MOST_TRIES: Final = 50
WORD_START: Final = re.compile(r"(?<=[^\s\x1c-\x1f])[ \n\t](?=[^\s\x1c-\x1f])")
"""A single space before a word. Byte-level encodings never have a token across its left side."""

Encode = Callable[[str], list[int]]


class TextPart(NamedTuple):
    """What of a document is encoded at once."""

    text: str
    is_first: bool
    is_last: bool


class _Cut(NamedTuple):
    end: int
    """Where the text before it ends."""
    start: int
    """Where the text after it starts: later where the space is one that the tokenizer puts before every text."""


def parts(pieces: Iterable[str], encode: Encode | None = None, characters: int | None = None) -> Iterator[str]:
    """Yield a text, which comes in any pieces, in parts that can be encoded one by one.

    They have about so many `characters` (default: `PART_CHARACTERS`).

    With `encode` each cut is tried; a text in which none is found stays whole. Without, the encoding is byte-level.
    """
    rest, length = "", characters or PART_CHARACTERS
    for piece in pieces:
        for first in range(0, len(piece), length):
            rest += piece[first : first + length]
            if len(rest) > length and (cut := _find(rest, length, encode)):
                yield rest[: cut.end]
                rest = rest[cut.start :]
    if rest:
        yield rest


def marked(texts: Iterable[str]) -> Iterator[TextPart]:
    """Yield the parts of one document, of which the first and the last are marked; an empty one where there is none."""
    following = iter(texts)
    text, is_first = next(following, ""), True
    for after in following:
        yield TextPart(text, is_first, is_last=False)
        text, is_first = after, False
    yield TextPart(text, is_first, is_last=True)


def _find(text: str, length: int, encode: Encode | None) -> _Cut | None:
    first = max(CONTEXT_CHARACTERS, len(text) - length // 2)
    for match in islice(WORD_START.finditer(text, first, len(text) - CONTEXT_CHARACTERS), MOST_TRIES):
        for cut in (_Cut(match.start(), match.start()), _Cut(match.start(), match.end())):
            if encode is None or _harmless(text, cut, match.start(), encode):
                return cut
    return None


def _harmless(text: str, cut: _Cut, middle: int, encode: Encode) -> bool:
    before = text[middle - CONTEXT_CHARACTERS : cut.end]
    after = text[cut.start : middle + CONTEXT_CHARACTERS]
    return encode(before) + encode(after) == encode(text[middle - CONTEXT_CHARACTERS : middle + CONTEXT_CHARACTERS])
