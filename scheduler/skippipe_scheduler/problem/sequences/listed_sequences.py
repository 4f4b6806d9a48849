"""Every legal sequence of stages, listed without a dead end: each step leads to at least one of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import ceil

from skippipe_scheduler.problem.rules import Rules


def stage_sequences(rules: Rules) -> Iterator[tuple[int, ...]]:
    """Yield every legal sequence of stages in lexicographic order (depth first).

    Their number grows fast beyond about eight stages; the time for the next one does not: no prefix is walked that no
    sequence has.
    """
    return _Listing(rules).extend((0,), 0)


def hops_through_protected(rules: Rules, frontier: int) -> int:
    """Return the fewest hops from the stage `frontier` through all protected stages above it."""
    ahead = [frontier, *(stage for stage in rules.protected_stages if stage > frontier)]
    return sum(ceil((later - earlier) / rules.max_forward_jump) for earlier, later in pairwise(ahead))


@dataclass(frozen=True)
class _Listing:
    """The depth-first walk through the legal sequences."""

    rules: Rules

    @cached_property
    def hops_ahead(self) -> tuple[int, ...]:
        """Fewest hops through the protected stages above each stage."""
        return tuple(hops_through_protected(self.rules, stage) for stage in range(self.rules.num_stages))

    def extend(self, sequence: tuple[int, ...], swaps: int) -> Iterator[tuple[int, ...]]:
        """Yield the legal sequences that begin with `sequence`, which has so many swaps and can be completed."""
        rules, frontier = self.rules, max(sequence)
        if len(sequence) in rules.lengths and not set(rules.protected_stages).difference(sequence):
            yield sequence
        if len(sequence) == rules.route_length:
            return
        last = min(rules.num_stages - 1, frontier + rules.max_forward_jump)
        for stage in (*self._late(sequence, swaps), *range(frontier + 1, last + 1)):
            longer, after = (*sequence, stage), swaps + (stage < frontier)
            if self._can_be_completed(longer, after):
                yield from self.extend(longer, after)

    def _late(self, sequence: tuple[int, ...], swaps: int) -> list[int]:
        """Return the stages behind the frontier that may come next, ascending."""
        rules, frontier = self.rules, max(sequence)
        if swaps == rules.max_swaps:
            return []
        nearest = max(1, frontier - rules.max_swap_distance)
        return [stage for stage in range(nearest, frontier) if stage not in sequence]

    def _can_be_completed(self, sequence: tuple[int, ...], swaps: int) -> bool:
        """Return whether some legal sequence begins so.

        What is late can best be visited at once, while it is near, and the rest in ascending order: every number of
        hops between the fewest and the most is then possible.
        """
        rules, frontier = self.rules, max(sequence)
        late, left = self._late(sequence, swaps), rules.max_swaps - swaps
        missing = [stage for stage in rules.protected_stages if stage < frontier and stage not in sequence]
        if len(missing) > left or not set(missing) <= set(late):
            return False
        fewest = len(sequence) + len(missing) + self.hops_ahead[frontier]
        most = len(sequence) + min(left, len(late)) + rules.num_stages - 1 - frontier
        return any(fewest <= length <= most for length in rules.lengths)
