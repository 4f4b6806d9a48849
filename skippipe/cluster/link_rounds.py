"""All ranks measure the links between them, in rounds.

Ranks that share a network (one host) share its links: one pair of hosts is measured by one pair of ranks. In a round a
host takes part once, so that measurements do not disturb each other.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import NamedTuple, NoReturn, TypeVar

import torch.distributed as dist

from skippipe.cluster.link_speed import MessageTimes, Peer, answer, measure_messages
from skippipe.cluster.location import RankLocation
from skippipe.cluster.streams import Door, Entrance, Stream, entrance, measure_streams
from skippipe.errors import PeerLostError
from skippipe.membership.addresses import own_address
from skippipe.runtime.ranks.agreement import all_gather_json
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic
from skippipe.runtime.ranks.torch_errors import TransferError, translating_errors

logger = logging.getLogger(__name__)
FAR_S = 0.002
"""Latency from which the bandwidth is that of a stream: nearer ones are held back by the processors as gloo is."""
STREAM_SHARE = 0.4
"""Of the time for a link and way, for each rate of its streams."""
LEAST_GBIT_PER_S = 1e-6
"""Of a link that let nothing through in its time."""
Pair = tuple[int, int]
Returned = TypeVar("Returned")


@dataclass(frozen=True)
class LinkOptions:
    """How links are measured."""

    size_bytes: int | None = None
    """Bytes of a message in training; None measures long ones."""
    link_s: float = 1.0
    """At most about so long for each direction of a link."""
    concurrent: int | None = None
    """Pairs of hosts measured at the same time; as many as there can be where None."""


class MeasuredLink(NamedTuple):
    """One direction between two ranks; `stream` is None inside a host."""

    source: int
    destination: int
    latency_s: float
    jitter_s: float
    gbit_per_s: float
    call_s: float
    stream: Stream | None

    @classmethod
    def of(cls, messages: MessageTimes, stream: Stream | None) -> "MeasuredLink":
        """Return what messages and streams say together."""
        streamed = LEAST_GBIT_PER_S if stream is None else max(LEAST_GBIT_PER_S, stream.one_gbit_per_s)
        gbit_per_s = streamed if messages.gbit_per_s is None else messages.gbit_per_s
        return cls(**(messages._asdict() | {"gbit_per_s": gbit_per_s}), stream=stream)

    @classmethod
    def from_json(cls, content: Sequence[object]) -> "MeasuredLink":
        """Return what another rank has sent."""
        link = cls(*content)  # type: ignore[arg-type]
        return link if link.stream is None else link._replace(stream=Stream(*link.stream))


def measure_links(
    context: DistributedContext, places: Sequence[RankLocation], options: LinkOptions
) -> list[MeasuredLink]:
    """Return the links that were measured, both ways of each pair. All ranks call this together.

    Raises `PeerLostError` where a rank stops.
    """
    if context.world_size == 1:
        return []
    inside, first = representatives(places)
    own: list[MeasuredLink] = []
    with _doors(context, several=len(first) > 1) as (own_entrance, doors):
        schedule = [*([inside] if inside else []), *rounds(first, options.concurrent)]
        for index, pairs in enumerate(schedule):
            if context.rank == 0:
                logger.info("links: round %d of %d", index + 1, len(schedule))
            wait_for_all(context)
            pair = next((pair for pair in pairs if context.rank in pair), None)
            if pair is not None:
                way = None if pairs is inside else own_entrance
                own.append(_or_lost(context, partial(_measure, context, pair, way, doors, options)))
    gathered = all_gather_json(context, Topic.PROFILE_LINKS, lambda: own)
    return [MeasuredLink.from_json(content) for entries in gathered for content in entries]


def _measure(
    context: DistributedContext,
    pair: Pair,
    own_entrance: Entrance | None,
    doors: Mapping[int, Door],
    options: LinkOptions,
) -> MeasuredLink:
    """Measure both directions, the first of the pair first; return the link from here."""
    is_first = context.rank == pair[0]
    other = pair[is_first]
    peer = Peer(other)
    far_s = inf if own_entrance is None else FAR_S
    if not is_first:
        answer(peer)
    messages = measure_messages(context.rank, peer, options.size_bytes, options.link_s, far_s)
    if is_first:
        answer(peer)
    if own_entrance is None:
        return MeasuredLink.of(messages, None)
    connect = doors[other].knock if is_first else own_entrance.accept
    round_trip_s, measured_s = 2 * messages.latency_s, STREAM_SHARE * options.link_s
    stream = measure_streams((context.rank, other), connect, peer.meet, is_first, round_trip_s, measured_s)
    return MeasuredLink.of(messages, stream)


@contextmanager
def _doors(context: DistributedContext, *, several: bool) -> Iterator[tuple[Entrance | None, dict[int, Door]]]:
    """Open a door on every rank where there are several hosts; none where one of their systems cannot tell rates."""
    with entrance(own_address(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))) as own:
        content = own.door if own is not None and several else None
        found = all_gather_json(context, Topic.PROFILE_DOORS, lambda: content)
        doors = {rank: Door(*door) for rank, door in enumerate(found) if door is not None}
        yield (own, doors) if len(doors) == context.world_size else (None, {})


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
        step = concurrent or max(1, len(whole))
        found += [whole[first : first + step] for first in range(0, len(whole), step)]
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def same_network(places: Sequence[RankLocation], link: MeasuredLink) -> bool:
    """Whether the link is inside a host."""
    return places[link.source].network == places[link.destination].network


def of_all_ranks(places: Sequence[RankLocation], measured: Sequence[MeasuredLink]) -> dict[Pair, MeasuredLink]:
    """Return the link of every ordered pair of ranks, those of one host taken from its representatives."""
    by_network = {(places[link.source].network, places[link.destination].network): link for link in measured}
    ranks = range(len(places))
    return {
        (source, destination): by_network[places[source].network, places[destination].network]
        for source in ranks
        for destination in ranks
        if source != destination
    }


def wait_for_all(context: DistributedContext) -> None:
    """Wait until all ranks are here. Raises `PeerLostError`."""
    if context.store is not None:
        others = tuple(rank for rank in range(context.world_size) if rank != context.rank)
        _or_lost(context, lambda: translating_errors("waited for the others", others, dist.barrier))


def _or_lost(context: DistributedContext, action: Callable[[], Returned]) -> Returned:
    try:
        return action()
    except TransferError as reason:
        _lost(context, reason)


def _lost(context: DistributedContext, reason: TransferError) -> NoReturn:
    raise PeerLostError(
        f"rank {context.rank} {reason.action} in vain: {reason.cause}; see the messages of the other ranks, and "
        "whether each host reaches all others"
    ) from None
