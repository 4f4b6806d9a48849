"""A draft without any layer: what followed the last tokens of a text where they stood in it before.

This is prompt lookup decoding (Saxena 2023, as `prompt_lookup_num_tokens` of transformers). A text that quotes, lists
or repeats itself is drafted for nothing.
"""

from bisect import bisect_right
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from skippipe.inference.generation.checked_texts import CheckedTexts
from skippipe.inference.generation.drafts.drafter import DraftedTokens
from skippipe.inference.generation.drafts.gain import Chances, PassTimes, best_length

LONGEST = 3
"""Tokens by which a place in the text is found."""
BORDERS = (1, 2, 3, 4, 8)
"""From how many same tokens before it a token has the next level of confidence."""
EXPECTED = (0.02, 0.2, 0.4, 0.5, 0.7, 0.9)
MOST_COMPARED = BORDERS[-1]


class LookupDraft:
    """Drafts for one batch by lookups in its own texts, each row in its own."""

    def __init__(self, checks: PassTimes) -> None:
        """`checks` are the times of passes of the whole model."""
        self._checks = checks
        self._chances = Chances(EXPECTED)
        self._texts: list[RepeatedText] = []
        self._found: list[list[int]] = []
        """What is found for each row."""
        self._levels: list[list[int]] = []
        """Level of each token that is found, by row and column."""

    def read(self, texts: CheckedTexts, padding: Sequence[int]) -> None:
        """See how the texts go on; the first columns of each row may be padding."""
        if not self._texts:
            self._texts = [RepeatedText() for _ in padding]
        for row, (text, unused) in enumerate(zip(self._texts, padding, strict=True)):
            text.extend(texts.ids[row, unused + len(text) : texts.length].tolist())

    def at_most_s(self, num_drafted: int) -> float:
        """Return what the check of so many drafted tokens may take."""
        return self._checks.at_most_s(num_drafted + 1)

    def worth(self, running: Sequence[bool], room: int, rate: float) -> float:
        """Look up to `room` tokens up; return what is gained by as many as are worth their time."""
        self._found, self._levels = [], []
        for text in self._texts:
            found, length = text.continuation(room)
            self._found.append(found)
            self._levels.append([bisect_right(BORDERS, length + at if length else 0) for at in range(room)])
        chances = [
            prod(self._chances.of(levels[at]) for levels, runs in zip(self._levels, running, strict=True) if runs)
            for at in range(room)
        ]
        length, gain = best_length(chances, lambda drafted: self._checks.seconds(drafted + 1), rate)
        self._found = [found[:length] for found in self._found]
        return gain

    def propose(self, texts: CheckedTexts) -> DraftedTokens:
        """Put what is found behind the texts."""
        count = max(map(len, self._found))
        rows = [found + [0] * (count - len(found)) for found in self._found]
        texts.ids[:, texts.length : texts.length + count] = torch.tensor(rows, device=texts.ids.device)
        return DraftedTokens(chances=[None] * count)

    def learn(self, running: Sequence[bool], stays: Sequence[Tensor]) -> None:
        """See which tokens stayed, (B,) for each column."""
        for at, stayed in enumerate(stays):
            for levels, runs, stay in zip(self._levels, running, stayed.tolist(), strict=True):
                if runs:
                    self._chances.add(levels[at], stay)


class RepeatedText:
    """A text, and where each sequence of a few tokens stood last with a token behind it."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens at the end."""
        for token in tokens:
            for count in range(1, min(LONGEST, len(self._tokens)) + 1):
                self._places[tuple(self._tokens[-count:])] = len(self._tokens)
            self._tokens.append(token)

    def continuation(self, count: int) -> tuple[list[int], int]:
        """Return what may come next, and before it how many tokens are the same there; nothing and 0 if none are."""
        tokens = self._tokens
        keys = (tuple(tokens[-length:]) for length in range(min(LONGEST, len(tokens)), 0, -1))
        key = next((key for key in keys if key in self._places), None)
        if key is None:
            return [], 0
        place, length = self._places[key], len(key)
        while length < min(MOST_COMPARED, place) and tokens[place - length - 1] == tokens[-length - 1]:
            length += 1
        found = tokens[place : place + count]
        while len(found) < count:  # the text repeats itself up to its end
            found.append(found[len(found) - (len(tokens) - place)])
        return found, length
