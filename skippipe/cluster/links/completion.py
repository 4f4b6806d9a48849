"""The bandwidth of pairs of hosts that were not measured.

Hosts are numbered from 0. Between two of them there are the way out of the one, the way into the other, and what joins
their regions; the narrowest decides. How wide each is, the fastest of the measured pairs that lead through it says.
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from skippipe.cluster.links.host_pairs import Pair


@dataclass(frozen=True)
class Completion:
    """How many pairs of hosts were measured, and by how much pairs that were held back differ from their completion."""

    measured_pairs: int
    all_pairs: int
    relative_errors: tuple[float, ...]
    """Of each way of each pair that was held back: the completion over what was measured, less 1."""

    @property
    def median_error(self) -> float:
        """The median of the errors, whichever way they go."""
        return statistics.median(map(abs, self.relative_errors)) if self.relative_errors else inf

    @property
    def most_error(self) -> float:
        """What nine of ten errors stay below."""
        ordered = sorted(map(abs, self.relative_errors))
        return ordered[int(0.9 * (len(ordered) - 1) + 0.5)] if ordered else inf


def completed(regions: Sequence[str], gbit_per_s: Mapping[Pair, float]) -> dict[Pair, float]:
    """Return the bandwidth of every ordered pair of hosts: as measured, else as completed.

    Raises `ValueError` where nothing was measured.
    """
    if not gbit_per_s:
        raise ValueError("there is nothing to complete from")
    out: defaultdict[int, float] = defaultdict(float)
    into: defaultdict[int, float] = defaultdict(float)
    across: defaultdict[tuple[str, str], float] = defaultdict(float)
    for (source, destination), rate in gbit_per_s.items():
        ends = regions[source], regions[destination]
        out[source] = max(out[source], rate)
        into[destination] = max(into[destination], rate)
        across[ends] = max(across[ends], rate)
    usual = statistics.median(gbit_per_s.values())
    found = {}
    for source, first in enumerate(regions):
        for destination, second in enumerate(regions):
            if source != destination:
                ways = (out.get(source), into.get(destination), across.get((first, second)))
                known = [rate for rate in ways if rate is not None]
                found[source, destination] = gbit_per_s.get((source, destination), min(known, default=usual))
    return found


def completion_of(
    regions: Sequence[str], gbit_per_s: Mapping[Pair, float], held_back: Mapping[Pair, float]
) -> Completion:
    """Return how good the completion from `gbit_per_s` is, at the pairs that were measured but `held_back` from it."""
    expected = completed(regions, gbit_per_s)
    errors = tuple(expected[pair] / rate - 1 for pair, rate in held_back.items())
    pairs = {frozenset(pair) for pair in (*gbit_per_s, *held_back)}
    return Completion(len(pairs), len(regions) * (len(regions) - 1) // 2, errors)
