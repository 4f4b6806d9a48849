"""Questions with one right answer, made from a seed: no data to download, none in anybody's training text.

Each prompt shows some examples of its kind and ends where the answer begins; an answer is the rest of the line.
"""

import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass

EXAMPLES = 4
"""Examples before each question."""
FRAGILE = '{}[]":,'
"""Characters of a JSON text without any of which it is none."""


@dataclass(frozen=True)
class ExactQuestion:
    """What the model reads, and the line that it is to write."""

    prompt: str
    answer: str


def questions(kind: str, count: int, seed: int) -> list[ExactQuestion]:
    """Return questions of one of `KINDS`; the first ones are the same whatever the count."""
    generator = random.Random(f"{kind}/{seed}")
    made = []
    for _ in range(count):
        lines = [KINDS[kind](generator) for _ in range(EXAMPLES + 1)]
        shown = "".join(f"{asked} {answer}\n" for asked, answer in lines[:-1])
        asked, answer = lines[-1]
        made.append(ExactQuestion(shown + asked, answer))
    return made


def questions_of_all_kinds(count: int, seed: int) -> dict[str, list[ExactQuestion]]:
    """Return `count` questions of each kind."""
    return {kind: questions(kind, count, seed) for kind in KINDS}


def _copying(generator: random.Random) -> tuple[str, str]:
    words = ["".join(generator.choices(string.ascii_lowercase, k=3)) for _ in range(4)]
    return f"text: {' '.join(words)}\ncopy:", " ".join(words)


def _addition(generator: random.Random) -> tuple[str, str]:
    first, second = generator.randrange(10, 100), generator.randrange(10, 100)
    return f"{first} + {second} =", str(first + second)


def _json_repair(generator: random.Random) -> tuple[str, str]:
    """Leave one character out of a JSON text that is none without it."""
    names = generator.sample(("name", "size", "list", "color", "city", "year"), k=2)
    values = [generator.randrange(100), [generator.randrange(10) for _ in range(3)], generator.choice(("red", "Rome"))]
    right = json.dumps(dict(zip(names, generator.sample(values, k=2), strict=True)))
    at = generator.choice([place for place, character in enumerate(right) if character in FRAGILE])
    return f"broken: {right[:at]}{right[at + 1 :]}\nfixed:", right


KINDS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "copying": _copying,
    "addition": _addition,
    "json_repair": _json_repair,
}
"""Copy four made-up words; add two numbers of two digits; put back the character that a JSON text lacks."""
