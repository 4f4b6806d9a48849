"""Damages texts and bytes as disks, editors and strangers do, the same for the same seed."""

import random
import re
from collections.abc import Iterator

TOKENS = (
    b"",
    b"null",
    b"true",
    b"-1",
    b"0",
    b"1e400",
    b"1e3",
    b"NaN",
    b"1000000000000",
    b"9" * 5000,
    b"0b_",
    b"010",
    b"1:30",
    b"!!int x",
    b"!!binary x",
    b"!!python/object/apply:os.getcwd []",
    b"&a [*a]",
    b"*a",
    b"<<",
    b'"\\u0000"',
    b'"\\u001b[31m\\n"',
    b'"\\ud800"',
    b"\x00",
    b"\x1b",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    "\u2028é漢".encode(),
    b"../../x",
    b"~",
    b"$NOWHERE",
    b"${name}",
    b"${oc.env:NOWHERE}",
    b"[" * 3000,
    b"{" * 3000,
    b"- " * 3000,
    b"? " * 3000,
    b"&a [*b, *b] \n&b [*a]",
    b"0x",
    b"+",
    b".",
    b".inf",
    b"=",
    b"??",
    b"???",
    b"${",
    b"}",
    b"\\",
    b"[]",
    b"{}",
    b"- ",
    b": ",
    b"'",
    b'"',
    b"\n",
    b"\t",
    b"#",
    b"%",
)
"""What programs stumble over, put in place of a part or between two."""
SCALAR = re.compile(rb"[A-Za-z0-9_.+-]+")
RUN = re.compile(rb"\"[^\"\n]*\"|[A-Za-z0-9_.+-]+|[\[\]{},:]")


def mutated(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Yield `count` damaged forms of `content`; some are damaged more than once."""
    rng = random.Random(seed)
    for _ in range(count):
        damaged = content
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            damaged = rng.choice(WAYS)(rng, damaged)
        yield damaged


def _flip(rng: random.Random, content: bytes) -> bytes:
    if not content:
        return b"\x01"
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


def _cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _drop(rng: random.Random, content: bytes) -> bytes:
    begin, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return content[:begin] + content[min(end, begin + 40) :]


def _repeat(rng: random.Random, content: bytes) -> bytes:
    begin, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return content[:end] + content[begin:end][:200] + content[end:]


def _insert(rng: random.Random, content: bytes) -> bytes:
    place = rng.randrange(len(content) + 1)
    return content[:place] + rng.choice(TOKENS) + content[place:]


def _blank(rng: random.Random, content: bytes) -> bytes:
    begin = rng.randrange(len(content) + 1)
    length = min(rng.randrange(1, 64), len(content) - begin)
    return content[:begin] + bytes(length) + content[begin + length :]


def _replace(rng: random.Random, content: bytes) -> bytes:
    """Put a token in the place of a value or a key."""
    parts = list(SCALAR.finditer(content))
    if not parts:
        return _insert(rng, content)
    part = rng.choice(parts)
    return content[: part.start()] + rng.choice(TOKENS) + content[part.end() :]


def _exchange(rng: random.Random, content: bytes) -> bytes:
    """Put a part in the place of another one."""
    parts = list(RUN.finditer(content))
    if len(parts) < 2:
        return _insert(rng, content)
    part, other = rng.sample(parts, 2)
    return content[: part.start()] + other[0] + content[part.end() :]


WAYS = (_flip, _cut, _drop, _repeat, _insert, _blank, _replace, _replace, _replace, _exchange, _exchange)
