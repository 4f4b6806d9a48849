"""What the network cards of hosts carry, as far as the streams of a profile have shown it."""

from collections import Counter, defaultdict

from skippipe.cluster.profile import Profile
from skippipe.cluster.rounding import rounded
from skippipe_scheduler.problem.cluster import Node
from skippipe_scheduler.problem.sharing.capacities import Duplex


def with_cards(profile: Profile) -> tuple[tuple[Node, ...], dict[str, Duplex]]:
    """Return the nodes with what their cards carry at least, and the uplinks of regions that are one host.

    A card carries the most that several connections to one other host have carried. A host with several nodes has its
    card as the uplink of its region, because links inside the host do not lead through it; where the region has other
    hosts, too, it gets none.
    """
    networks = [place.network for place in profile.places]
    sent: defaultdict[str, float] = defaultdict(float)
    received: defaultdict[str, float] = defaultdict(float)
    for stream in (detail.stream for detail in profile.details if detail.stream is not None):
        rate = max(stream.one_gbit_per_s, stream.several_gbit_per_s)
        source, destination = networks[stream.source], networks[stream.destination]
        sent[source] = max(sent[source], rate)
        received[destination] = max(received[destination], rate)
    cards = {
        network: Duplex(up=rounded(sent[network]), down=rounded(received[network]))
        for network in sent
        if sent[network] > 0 and received[network] > 0
    }
    of_region: defaultdict[str, set[str]] = defaultdict(set)
    for node, network in zip(profile.nodes, networks, strict=True):
        of_region[node.region].add(network)
    sizes = Counter(networks)
    nodes = tuple(
        node.model_copy(update={"card_gbit_per_s": cards.get(network)}) if sizes[network] == 1 else node
        for node, network in zip(profile.nodes, networks, strict=True)
    )
    uplinks = {
        region: cards[network]
        for region, (network, *others) in ((region, [*found]) for region, found in of_region.items())
        if not others and sizes[network] > 1 and network in cards
    }
    return nodes, uplinks
