"""Sequences with even coverage, dealt stage by stage: the microbatches that have to visit a stage soonest take it."""

import random
from math import floor

from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.problem.sequences.listed_sequences import hops_through_protected

_DEALS = 60
"""Deals that are tried, each with other ties and, after the first, with visits rounded at random. Measured: with
40 stages, 14 visits and jumps of 3, where hardly anything is free, one in fifty comes out."""


def deal_sequences(rules: Rules, total: int, seed: int) -> list[tuple[int, ...]] | None:
    """Return an ascending sequence per microbatch of `total`, the stages visited as evenly as `rules` ask for.

    Takes time in proportion to stages and microbatches. None where no deal came out, which does not prove that there
    are no such sequences: `sequence_flow` searches for them.
    """
    rng = random.Random(seed)
    hops_ahead = [hops_through_protected(rules, stage) for stage in range(rules.num_stages)]
    for number in range(_DEALS):
        deal = _Deal(rules, total, hops_ahead, rng, even=number == 0)
        if all(deal.next_stage(stage) for stage in range(1, rules.num_stages)):
            return [tuple(sequence) for sequence in deal.sequences]
    return None


class _Deal:
    """The sequences so far, and how many hops each has left."""

    def __init__(self, rules: Rules, total: int, hops_ahead: list[int], rng: random.Random, *, even: bool) -> None:
        self.rules, self.hops_ahead, self.rng, self.even = rules, hops_ahead, rng, even
        self.sequences = [[0] for _ in range(total)]
        self.left = [length - 1 for length, count in rules.length_counts(total).items() for _ in range(count)]
        self.coverage = rules.coverage(total)

    def next_stage(self, stage: int) -> bool:
        """Deal the visits of a stage; return whether the rules can still be obeyed."""
        rules, last = self.rules, self.rules.num_stages - 1
        may = [
            m
            for m, sequence in enumerate(self.sequences)
            if self.left[m] > self.hops_ahead[stage] and stage - sequence[-1] <= rules.max_forward_jump
        ]
        # By which stage a microbatch has to go on: as far as it can jump, with room for all its hops.
        latest = {m: min(self.sequences[m][-1] + rules.max_forward_jump, last + 1 - self.left[m]) for m in may}
        self.rng.shuffle(may)
        may.sort(key=latest.__getitem__)
        number = self._visits(stage, self._least_visits(stage, sorted(latest.values())), len(may))
        if number is None:
            return False
        for m in may[:number]:
            self.sequences[m].append(stage)
            self.left[m] -= 1
        return all(
            self.left[m] <= last - stage
            and (self.left[m] == 0 or sequence[-1] + rules.max_forward_jump > stage or stage == last)
            for m, sequence in enumerate(self.sequences)
        )

    def _least_visits(self, stage: int, latest: list[int]) -> int:
        """Return how many have to visit a stage, because those behind it have too little room for all by their latest.

        `latest` is ascending.
        """
        least = room = 0
        reached = stage
        for position, by_stage in enumerate(latest, start=1):
            while reached < by_stage:
                reached += 1
                room += self.coverage[reached][1]
            least = max(least, position - room)
        return least

    def _visits(self, stage: int, least: int, most: int) -> int | None:
        """Return how many of the `least` to `most` possible visits a stage gets, the rest shared out behind it."""
        low, high = self.coverage[stage]
        behind, left = self.coverage[stage + 1 :], sum(self.left)
        least = max(least, low, left - sum(bounds[1] for bounds in behind))
        most = min(most, high, left - sum(bounds[0] for bounds in behind))
        if least > most:
            return None
        always = sum(bounds[0] for bounds in behind if bounds[0] == bounds[1] == len(self.left))
        shared = 1 + sum(not bounds[0] == bounds[1] == len(self.left) for bounds in behind)
        # Which of the stages get the one visit more can decide whether the last ones can still be reached.
        fair = (left - always) / shared
        number = round(fair) if self.even else floor(fair + self.rng.random())
        return min(max(number, least), most)
