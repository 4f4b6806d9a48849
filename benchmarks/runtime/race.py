"""Contenders side by side: a few steps each in turn, many times; ratios are taken within a turn."""

import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from crew import Crew

LOSS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Race:
    """Seconds of a step in every round, by contender."""

    seconds: Mapping[str, Sequence[float]]

    def median_s(self, name: str) -> float:
        """Return the median seconds of a step."""
        return statistics.median(self.seconds[name])

    def fastest(self, names: Sequence[str]) -> str:
        """Return the contender with the shortest median."""
        return min(names, key=self.median_s)

    def ratios(self, name: str, rival: str) -> list[float]:
        """Return by how much `name` is faster than `rival`, round by round, in ascending order."""
        return sorted(other / own for own, other in zip(self.seconds[name], self.seconds[rival], strict=True))


def run_race(crews: Sequence[Crew], *, rounds: int, steps: int, warm_up: int = 2) -> Race:
    """Let every crew run `steps` in turn, `rounds` times, each time in another order: nobody is always the first."""
    shuffler = random.Random(0)
    for crew in crews:
        crew.steps(warm_up)
    seconds: dict[str, list[float]] = {crew.name: [] for crew in crews}
    for turn in range(rounds):
        print(f"  round {turn + 1} of {rounds}", file=sys.stderr)
        for crew in shuffler.sample(crews, len(crews)):
            seconds[crew.name].append(crew.steps(steps))
    return Race(seconds)


def check_equal_work(crews: Sequence[Crew]) -> float:
    """Return the largest relative difference between the losses of the crews; raise `RuntimeError` beyond tolerance."""
    first, *others = crews
    worst = 0.0
    for crew in others:
        if len(crew.losses) != len(first.losses):
            raise RuntimeError(f"{crew.name} reports {len(crew.losses)} losses, {first.name} {len(first.losses)}")
        for step, (loss, other) in enumerate(zip(first.losses, crew.losses, strict=True), start=1):
            worst = max(worst, abs(loss - other) / loss)
            if worst > LOSS_TOLERANCE:
                raise RuntimeError(f"unequal work: step {step}: loss {loss} of {first.name}, {other} of {crew.name}")
    return worst
