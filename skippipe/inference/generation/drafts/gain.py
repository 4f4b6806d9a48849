"""What a draft gains: how often its tokens stay, how long passes take, and the length that is worth it.

Tokens for time, as in KnapSpec (arXiv 2602.20217): where tokens come at a rate of `r` in a second, a draft is worth
what it brings less `r` times its seconds. It ends where one more token would no longer be worth its own.
"""

import statistics
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

KEPT_TIMES = 5
"""Times of passes that are remembered for each number of tokens."""


class Chances:
    """How often drafted tokens stay, by a level of confidence in them; what is long ago counts less."""

    def __init__(self, expected: Sequence[float], *, weight: float = 2.0, memory: int = 64) -> None:
        """`expected` has what each level starts from, which counts as much as `weight` tokens."""
        self._expected, self._weight = list(expected), weight
        self._forget = 1 - 1 / memory
        self._stayed, self._seen = [0.0] * len(self._expected), [0.0] * len(self._expected)

    def add(self, level: int, stays: bool) -> None:
        """See whether a token stayed."""
        self._stayed = [count * self._forget for count in self._stayed]
        self._seen = [count * self._forget for count in self._seen]
        self._stayed[level] += stays
        self._seen[level] += 1

    def of(self, level: int) -> float:
        """Return the chance of a token of this level."""
        return (self._stayed[level] + self._weight * self._expected[level]) / (self._seen[level] + self._weight)

    @property
    def mean(self) -> float:
        """The chance of a token whose level is not known yet."""
        expected = sum(self._expected) / len(self._expected)
        return (sum(self._stayed) + self._weight * expected) / (sum(self._seen) + self._weight)


class PassTimes:
    """How long passes took, by their number of tokens."""

    def __init__(self) -> None:
        self._times_s: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT_TIMES))
        self._lengths: list[int] = []
        self._medians_s: list[float] = []

    def __contains__(self, num_tokens: int) -> bool:
        return num_tokens in self._times_s

    def add(self, num_tokens: int, duration_s: float) -> None:
        """See how long a pass took."""
        self._times_s[num_tokens].append(duration_s)
        self._lengths = sorted(self._times_s)
        self._medians_s = [statistics.median(self._times_s[length]) for length in self._lengths]

    def seconds(self, num_tokens: int) -> float:
        """Return the median, from the lengths around it where there is none; as of the longest one above that."""
        at = bisect_left(self._lengths, num_tokens)
        if at == len(self._lengths):
            return self._medians_s[-1] if self._medians_s else 0.0
        if at == 0 or self._lengths[at] == num_tokens:
            return self._medians_s[at]
        (first, last), (first_s, last_s) = self._lengths[at - 1 : at + 1], self._medians_s[at - 1 : at + 1]
        return first_s + (last_s - first_s) * (num_tokens - first) / (last - first)

    def at_most_s(self, num_tokens: int) -> float:
        """Return the same, but above the longest one each token takes as long as the others on the mean.

        Where a single length is known, that is as long as decoding token by token.
        """
        longest, first = self._lengths[-1], self._lengths[0]
        first_s, longest_s = self._medians_s[0], self._medians_s[-1]
        token_s = (longest_s - first_s) / (longest - first) if longest > first else longest_s / longest
        return self.seconds(num_tokens) + max(0, num_tokens - longest) * max(0.0, token_s)


class Speed:
    """How fast tokens have come of late."""

    def __init__(self, *, memory: int = 10) -> None:
        self._forget = 1 - 1 / memory
        self._tokens = self._duration_s = 0.0

    def add(self, num_tokens: int, duration_s: float) -> None:
        """See how many tokens a draft and its check brought, and how long both took."""
        self._tokens = self._tokens * self._forget + num_tokens
        self._duration_s = self._duration_s * self._forget + duration_s

    def rate(self, whole_s: float) -> float:
        """Return the tokens of a second: those of late, or of the whole model's `whole_s` a token if these are more."""
        recent = self._tokens / self._duration_s if self._duration_s else 0.0
        return max(recent, 1 / whole_s)


def most_affordable(at_most_s: Callable[[int], float], room: int, may_take_s: float) -> int:
    """Return how many of up to `room` tokens can be drafted in a time, if none of them stays."""
    return next((number for number in range(room, 0, -1) if at_most_s(number) <= may_take_s), 0)


def best_length(chances: Sequence[float], seconds: Callable[[int], float], rate: float) -> tuple[int, float]:
    """Return how many tokens to draft, and what that gains in tokens.

    Args:
        chances: The chance that each drafted token stays where those before it stay.
        seconds: What so many drafted tokens take, with their check.
        rate: Tokens in a second that are to be had otherwise.
    """
    best, gain = 0, 1 - rate * seconds(0)
    expected = chain = 1.0
    for number, chance in enumerate(chances, start=1):
        chain *= chance
        expected += chain
        value = expected - rate * seconds(number)
        if value > gain:
            best, gain = number, value
    return best, gain
