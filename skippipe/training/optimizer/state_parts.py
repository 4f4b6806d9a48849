"""Who of a stage's replicas updates which parameters, and what has to be sent when there are other replicas."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from skippipe_scheduler.files import StrictModel

WEIGHTS = "weights"
"""Key of the parameter itself beside the keys of its state."""
WeightsStand = Literal["right", "behind", "given"]
"""Of the weights whose state is not held: right; some may lack the last step; or another replica gives them."""


class StatePart(NamedTuple):
    """Of which parameters a replica holds the state."""

    own: tuple[str, ...]
    """Those that it updates for all."""
    copied: tuple[str, ...]
    """Those of the next replica, of which it holds a second copy."""


def state_parts(sizes: Mapping[str, int], count: int, *, copies: bool) -> list[StatePart]:
    """Return what each of `count` replicas holds: the largest parameter first, each to who has least so far."""
    taken: list[list[str]] = [[] for _ in range(count)]
    totals = [0] * count
    for name in sorted(sizes, key=lambda name: sizes[name], reverse=True):
        least = totals.index(min(totals))
        taken[least].append(name)
        totals[least] += sizes[name]
    following = [*taken[1:], *taken[:1]] if copies and count > 1 else [[] for _ in range(count)]
    return [StatePart(tuple(own), tuple(copied)) for own, copied in zip(taken, following, strict=True)]


class Holding(StrictModel):
    """What one replica has when replicas meet."""

    weights: WeightsStand
    keys: dict[str, tuple[str, ...]]
    """Of the state that it holds, by parameter; the weights of these are right too."""


class Transfer(NamedTuple):
    """One tensor on its way."""

    name: str
    key: str
    source: int
    destination: int


class Handover(NamedTuple):
    """What is sent among replicas so that each has all weights and the state that it is to hold."""

    transfers: tuple[Transfer, ...]
    lost: tuple[str, ...]
    """Parameters whose state nobody has."""


def handover(names: Sequence[str], holdings: Sequence[Holding], wanted: Sequence[StatePart]) -> Handover:
    """Return what is to be sent, the same on every replica; `wanted` is what each is to hold from then on.

    Weights come from who holds the state. Where nobody does, they come from one of those who have them, also to who is
    given them later: its master copies begin with them.
    """
    behind = any(holding.weights == "behind" for holding in holdings)
    wrong = [holding.weights == "behind" or (behind and holding.weights == "given") for holding in holdings]
    standing = min(range(len(holdings)), key=lambda rank: ("right", "behind", "given").index(holdings[rank].weights))
    transfers: list[Transfer] = []
    lost: list[str] = []
    for position, name in enumerate(names):
        holders = [rank for rank, holding in enumerate(holdings) if name in holding.keys]
        source = holders[position % len(holders)] if holders else standing
        if not holders:
            lost.append(name)
        for rank in range(len(holdings)):
            if rank == source or rank in holders:
                continue
            needs_weights = wrong[rank] or (not holders and holdings[rank].weights == "given")
            keys = [WEIGHTS] if needs_weights else []
            if holders and name in (*wanted[rank].own, *wanted[rank].copied):
                keys += holdings[source].keys[name]
            transfers += [Transfer(name, key, source, rank) for key in keys]
    return Handover(tuple(transfers), tuple(lost))
