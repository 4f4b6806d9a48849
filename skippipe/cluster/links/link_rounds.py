"""All ranks measure the links between them, in rounds.

Ranks that share a network (one host) share its links: one pair of hosts is measured by one pair of ranks. In a round a
host takes part once, so that measurements do not disturb each other.

All pairs of n hosts take n - 1 rounds of some seconds. Where hosts are many, these rounds have echoes only, which take
a few round trips, and bandwidth is measured in a number of rounds that does not grow (`completion`).
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf
from statistics import median
from typing import NamedTuple, NoReturn, TypeVar

import torch.distributed as dist

from skippipe.cluster.links.completion import Completion, completed, completion_of
from skippipe.cluster.links.host_pairs import Pair, chosen_rounds, parts, representatives, rounds
from skippipe.cluster.links.link_speed import MessageTimes, Peer, answer, measure_echoes, measure_messages
from skippipe.cluster.links.streams import Stream, StreamAddress, StreamListener, listening, measure_streams
from skippipe.cluster.location import RankLocation
from skippipe.cluster.regions import NEAR_S, regions
from skippipe.errors import PeerLostError
from skippipe.membership.addresses import own_address
from skippipe.runtime.ranks.agreement import all_gather_json
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic
from skippipe.runtime.ranks.torch_errors import TransferError, translating_errors

logger = logging.getLogger(__name__)
FAR_S = 0.002
"""From this latency on, latency and bandwidth are those of streams; nearer links are held back by processors."""
STREAM_SHARE = 0.4
"""Of the time for a link and way, for each rate of its streams."""
LEAST_GBIT_PER_S = 1e-6
"""Of a link that let nothing through in its time."""
ALL_PAIRS_HOSTS = 16
"""Up to so many hosts, all pairs are measured: 15 rounds take a minute or two."""
BANDWIDTH_ROUNDS = 8
"""Where there are more hosts: each is measured with so many others, of as many regions as can be. For 32 to 256 hosts
with cards of 5 to 1000 Mbit/s, drawn at random and measured to 5%, nine of ten completions are then within 16%."""
SEGMENT_BYTES = 60
"""Of the segments whose round trip is the shortest, SYN and its answer; on a slow line they take a while."""
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
    bandwidth_rounds: int | None = None
    """With how many others each host's bandwidth is measured; where None, with all where they are few."""
    near_s: float = NEAR_S
    """Hosts that are nearer form a region."""

    def needed_rounds(self, num_hosts: int) -> int | None:
        """Return how many rounds measure bandwidth; None where they measure all pairs."""
        wanted = self.bandwidth_rounds
        if wanted is None:
            wanted = num_hosts if num_hosts <= ALL_PAIRS_HOSTS else BANDWIDTH_ROUNDS
        return wanted if wanted < num_hosts - 2 else None  # one round more is held back


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
        found = messages._asdict()
        if messages.gbit_per_s is None:
            found["gbit_per_s"] = max(LEAST_GBIT_PER_S, 0.0 if stream is None else stream.most_of_one_gbit_per_s)
        if stream is not None and messages.latency_s >= FAR_S:  # echoes wait for processors, too
            empty_s = 8e-9 * SEGMENT_BYTES / found["gbit_per_s"]
            found["latency_s"] = min(messages.latency_s, max(0.0, stream.round_trip_s / 2 - empty_s))
        return cls(**found, stream=stream)

    @classmethod
    def from_json(cls, content: Sequence[object]) -> "MeasuredLink":
        """Return what another rank has sent."""
        link = cls(*content)  # type: ignore[arg-type]  # as JSON writes a tuple
        return link if link.stream is None else link._replace(stream=Stream(*link.stream))


@dataclass(frozen=True)
class LinkSurvey:
    """The links between hosts and inside them, both ways of each pair of representatives."""

    links: tuple[MeasuredLink, ...]
    completion: Completion | None = None
    """Where the bandwidth of some pairs is completed."""


def measure_links(context: DistributedContext, places: Sequence[RankLocation], options: LinkOptions) -> LinkSurvey:
    """Measure links; all ranks call this together and get the same.

    Raises `PeerLostError` where a rank stops.
    """
    if context.world_size == 1:
        return LinkSurvey(())
    inside, hosts = representatives(places)
    with _addresses(context, several=len(hosts) > 1) as (own_listener, addresses):
        survey = _Survey(context, own_listener, addresses, options)
        own = survey.in_rounds([inside] if inside else [], outside=False)
        needed = options.needed_rounds(len(hosts))
        if needed is None:
            own += survey.in_rounds(rounds(hosts, options.concurrent))
            return LinkSurvey(tuple(survey.of_all(own)))
        echoes = survey.of_all(survey.echoes(rounds(hosts)))
        given = [places[rank].given_region for rank in hosts]
        found = regions(given, _latencies_s(hosts, echoes), options.near_s)
        schedule = [
            parts([(hosts[first], hosts[second]) for first, second in pairs], options.concurrent)
            for pairs in chosen_rounds(found, needed + 1)
        ]
        own += survey.in_rounds([pairs for parts in schedule for pairs in parts])
        measured = survey.of_all(own)
    held_back = {pair for pairs in schedule[-1] for pair in pairs}
    return _survey_completed(hosts, found, echoes, measured, held_back)


def _latencies_s(hosts: Sequence[int], echoes: Sequence["MeasuredLink"]) -> dict[Pair, float]:
    number = {rank: index for index, rank in enumerate(hosts)}
    return {(number[link.source], number[link.destination]): link.latency_s for link in echoes}


def _survey_completed(
    hosts: Sequence[int],
    in_regions: Sequence[str],
    echoes: Sequence["MeasuredLink"],
    measured: Sequence["MeasuredLink"],
    held_back: set[Pair],
) -> LinkSurvey:
    """Return the links of all pairs of hosts: measured ones, and echoes with a bandwidth by completion."""
    number = {rank: index for index, rank in enumerate(hosts)}
    rates = {
        (number[link.source], number[link.destination]): link.gbit_per_s
        for link in measured
        if link.source in number and link.destination in number
    }
    checked = {
        ways
        for first, second in held_back
        for ways in ((number[first], number[second]), (number[second], number[first]))
    }
    kept = {pair: rate for pair, rate in rates.items() if pair not in checked}
    completion = completion_of(in_regions, kept, {pair: rates[pair] for pair in sorted(checked)})
    whole = completed(in_regions, rates)
    call_s = median(link.call_s for link in measured)
    rest = [
        link._replace(gbit_per_s=whole[pair], call_s=call_s)
        for link in echoes
        if (pair := (number[link.source], number[link.destination])) not in rates
    ]
    return LinkSurvey((*measured, *rest), completion)


@dataclass(frozen=True)
class _Survey:
    """What the rounds of one survey share."""

    context: DistributedContext
    listener: StreamListener | None
    addresses: Mapping[int, StreamAddress]
    options: LinkOptions

    def in_rounds(self, schedule: Sequence[Sequence[Pair]], *, outside: bool = True) -> list[MeasuredLink]:
        """Measure all pairs, those of a round at the same time; return the links from here."""
        own = []
        for index, pairs in enumerate(schedule):
            if self.context.rank == 0:
                logger.info("links: round %d of %d", index + 1, len(schedule))
            wait_for_all(self.context)
            pair = self._own(pairs)
            if pair is not None:
                way = self.listener if outside else None
                own.append(
                    _or_lost(self.context, partial(_measure, self.context, pair, way, self.addresses, self.options))
                )
        return own

    def echoes(self, schedule: Sequence[Sequence[Pair]]) -> list[MeasuredLink]:
        """Measure the latency of all pairs; return the links from here, the same both ways, without bandwidth."""
        own = []
        if self.context.rank == 0:
            logger.info("latencies: %d rounds", len(schedule))
        wait_for_all(self.context)
        for pair in filter(None, map(self._own, schedule)):
            first, second = pair
            messages = _or_lost(
                self.context,
                partial(measure_echoes, self.context.rank, Peer(pair[self.context.rank == first]), first),
            )
            if messages is not None:
                there = MeasuredLink.of(messages, None)
                own += [there, there._replace(source=second, destination=first)]
        return own

    def of_all(self, own: Sequence[MeasuredLink]) -> list[MeasuredLink]:
        """Return what all ranks have measured."""
        gathered = all_gather_json(self.context, Topic.PROFILE_LINKS, lambda: own)
        return [MeasuredLink.from_json(content) for entries in gathered for content in entries]

    def _own(self, pairs: Sequence[Pair]) -> Pair | None:
        return next((pair for pair in pairs if self.context.rank in pair), None)


def _measure(
    context: DistributedContext,
    pair: Pair,
    own_listener: StreamListener | None,
    addresses: Mapping[int, StreamAddress],
    options: LinkOptions,
) -> MeasuredLink:
    """Measure both directions, the first of the pair first; return the link from here."""
    is_first = context.rank == pair[0]
    other = pair[is_first]
    peer = Peer(other)
    far_s = inf if own_listener is None else FAR_S
    if not is_first:
        answer(peer)
    messages = measure_messages(context.rank, peer, options.size_bytes, options.link_s, far_s)
    if is_first:
        answer(peer)
    if own_listener is None:
        return MeasuredLink.of(messages, None)
    connect = addresses[other].connect if is_first else own_listener.accept
    round_trip_s, measured_s = 2 * messages.latency_s, STREAM_SHARE * options.link_s
    stream = measure_streams((context.rank, other), connect, peer.meet, is_first, round_trip_s, measured_s)
    return MeasuredLink.of(messages, stream)


@contextmanager
def _addresses(
    context: DistributedContext, *, several: bool
) -> Iterator[tuple[StreamListener | None, dict[int, StreamAddress]]]:
    """Listen for streams on every rank of several hosts; nobody does where one of their systems cannot tell rates."""
    with listening(own_address(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))) as own:
        content = own.address if own is not None and several else None
        found = all_gather_json(context, Topic.PROFILE_ADDRESSES, lambda: content)
        addresses = {rank: StreamAddress(*address) for rank, address in enumerate(found) if address is not None}
        yield (own, addresses) if len(addresses) == context.world_size else (None, {})


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
