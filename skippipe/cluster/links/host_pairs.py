"""Which ranks measure which pairs of hosts, in rounds: in each of them a host takes part once."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

from skippipe.cluster.location import RankLocation

Pair = tuple[int, int]


def representatives(places: Sequence[RankLocation]) -> tuple[list[Pair], list[int]]:
    """Return the pairs of ranks that measure inside a network, and one rank of every network."""
    members: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        members.setdefault(place.network, []).append(rank)
    inside = [(ranks[0], ranks[1]) for ranks in members.values() if len(ranks) > 1]
    return inside, [ranks[0] for ranks in members.values()]


def rounds(ranks: Sequence[int], concurrent: int | None = None) -> list[list[Pair]]:
    """Return every pair of `ranks` once, in rounds of disjoint pairs, at most `concurrent` in each.

    One rank stays, the others move on by one seat from round to round (the circle method): no round can be spared.
    """
    seats: list[int | None] = [*ranks, *([None] if len(ranks) % 2 else [])]
    found = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        whole = [(pair, other) for pair, other in pairs if pair is not None and other is not None]
        found += parts(whole, concurrent)
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def parts(pairs: Sequence[Pair], concurrent: int | None) -> list[list[Pair]]:
    """Return the pairs of a round in rounds of at most `concurrent`."""
    step = concurrent or max(1, len(pairs))
    return [list(pairs[first : first + step]) for first in range(0, len(pairs), step)]


def chosen_rounds(regions: Sequence[str], num_rounds: int) -> list[list[Pair]]:
    """Return rounds of disjoint pairs of hosts, in each as many as can be, none twice.

    Regions whose link has been measured least come first, then hosts that have been measured least.
    """
    between: defaultdict[frozenset[str], int] = defaultdict(int)
    measured = [0] * len(regions)
    left = set(combinations(range(len(regions)), 2))
    rounds = []
    for _ in range(num_rounds):
        idle = set(range(len(regions)))
        pairs = []
        urgency = {
            pair: (measured[pair[0]] + measured[pair[1]], between[frozenset(regions[host] for host in pair)])
            for pair in left
        }
        for pair in sorted(left, key=lambda pair: (urgency[pair], (pair[1] - pair[0]) % (len(regions) - 1), pair)):
            if idle.issuperset(pair):
                idle -= {*pair}
                pairs.append(pair)
        for pair in pairs:
            left.remove(pair)
            between[frozenset(regions[host] for host in pair)] += 1
            for host in pair:
                measured[host] += 1
        rounds += [sorted(pairs)] if pairs else []
    return rounds
