"""A cluster: its nodes and the links between them, read from YAML (`skippipe.cluster/1`).

A link is looked up from the particular to the general: between two nodes, between two regions, within a
region, default. At each level a one-way entry (`from`, `to`) wins over one for both ways.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import networkx as nx
from pydantic import Field, model_validator

from skippipe_scheduler.errors import ProblemError, nearest
from skippipe_scheduler.files import Name, PositiveCount, PositiveSeconds, Seconds, StrictModel
from skippipe_scheduler.problem.sharing.capacities import Duplex, SharedCapacities, Uplink
from skippipe_scheduler.problem.sharing.contention import Contention
from skippipe_scheduler.yaml_file import parse_yaml, read_yaml

FORMAT = "skippipe.cluster/1"

MOST_NODES = 4096
"""Nodes of one cluster: a plan has a cost for each pair of them."""

Positive = Annotated[float, Field(ge=1e-9, le=1e9)]
"""Of the units that cluster files have; what lies beyond is a mistake, and products of such numbers are infinite."""
NamePair = tuple[str, str]
Device = Literal["cpu", "cuda"]
"""What a node computes on: on a CPU, messages and the copy for a checkpoint lie in its own memory."""
ASSUMED_DEVICE: Device = "cuda"
"""Of nodes for which nothing says it: models are trained on GPUs, whatever machine makes the plan."""


class Node(StrictModel):
    """One worker process with its device, or `count` equal ones named `name-0`, `name-1`, ...

    Speed: either `compute_tflop_per_s` or `forward_s`, `backward_s` and `loss_s`. Memory: either `memory_gib` or
    `max_in_flight`.

    Examples:
        >>> node = Node(name="iowa", region="Iowa", count=2, compute_tflop_per_s=125, memory_gib=72)
        >>> [member.name for member in node.members()]
        ['iowa-0', 'iowa-1']
    """

    name: Name = Field(examples=["iowa"])
    """Name of the node; of several equal ones what stands before their number."""
    region: Name = Field(examples=["Iowa"])
    """Where the node is; links are given between regions."""
    count: PositiveCount | None = Field(default=None, examples=[3])
    """How many equal nodes the entry stands for; one, named as it is, where not given."""
    compute_tflop_per_s: Positive | None = Field(default=None, examples=[125.0])
    """What the device sustains on this model (not its peak); task times follow from the model's FLOP."""
    forward_s: PositiveSeconds | None = Field(default=None, examples=[0.08])
    """Seconds of the forward of one microbatch on a stage of mean size, measured."""
    backward_s: PositiveSeconds | None = Field(default=None, examples=[0.16])
    """Seconds of the backward of one microbatch on a stage of mean size, measured."""
    loss_s: Seconds | None = Field(default=None, examples=[0.02])
    """Seconds of final norm, head and loss of one microbatch, forward and backward, measured."""
    memory_gib: Positive | None = Field(default=None, examples=[72.0])
    """Memory for weights, gradients, optimizer state and activations; what is left decides how many microbatches the
    node may hold at once."""
    max_in_flight: PositiveCount | None = Field(default=None, examples=[8])
    """How many microbatches the node may hold at once, in place of memory_gib."""
    peak_tflop_per_s: Positive | None = Field(default=None, examples=[312.0])
    """The most that the device can do; changes no plan, only the share of it that a run reports (MFU)."""
    device: Device | None = Field(default=None, examples=["cuda"])
    """What the node computes on, which decides what counts in its memory; as the cluster's where not given."""
    card_gbit_per_s: Duplex | None = Field(default=None, examples=[10.0])
    """What the node's network card carries each way, with contention shared: a number, or {up: 1, down: 10}; as
    links.card_gbit_per_s where not given."""

    @model_validator(mode="after")
    def _one_speed_and_one_memory(self) -> Self:
        measured = [value for value in (self.forward_s, self.backward_s, self.loss_s) if value is not None]
        if len(measured) != (3 if self.compute_tflop_per_s is None else 0):
            either = "either compute_tflop_per_s or all of forward_s, backward_s and loss_s"
            raise ValueError(f"node {self.name!r}: give {either}")
        if (self.memory_gib is None) == (self.max_in_flight is None):
            raise ValueError(f"node {self.name!r}: give either memory_gib or max_in_flight")
        return self

    def members(self) -> tuple["Node", ...]:
        """Return the single nodes that this entry stands for."""
        if self.count is None:
            return (self,)
        return tuple(
            self.model_copy(update={"name": f"{self.name}-{index}", "count": None}) for index in range(self.count)
        )


class MeasuredFor(StrictModel):
    """What one microbatch was when the times of a cluster file were measured.

    Model, width, layers of a stage, micro-batch and samples decide about a time by the FLOP that they make; so these
    are kept, with the number format, on which a device's speed depends.

    Examples:
        >>> MeasuredFor(about="3 layers (llama), 1 x 4096 tokens", dtype="float32", forward_tflop=1.47).backward
        2.94
    """

    about: str = Field(default="", examples=["3 layers (llama), 1 x 4096 tokens"])
    """Model and shape in words, for messages."""
    dtype: Literal["float32", "bfloat16"] | None = Field(default=None, examples=["bfloat16"])
    """Number format of weights and activations."""
    forward_tflop: Positive = Field(examples=[1.47])
    """TFLOP of the forward of one microbatch on a stage of mean size."""
    backward_tflop: Positive | None = Field(default=None, examples=[2.94])
    """TFLOP of its backward; twice those of the forward where not given."""
    loss_tflop: Positive | None = Field(default=None, examples=[1.61])
    """TFLOP of final norm, head and loss, forward and backward; where not given, the loss is taken to change as the
    forward does."""

    @property
    def backward(self) -> float:
        """TFLOP of the backward."""
        return self.backward_tflop or 2 * self.forward_tflop


class Link(StrictModel):
    """One direction of a link: B bytes alone on it take latency + 8e-9 B / gbit_per_s seconds.

    Examples:
        >>> link = Link(latency_ms=20, gbit_per_s=0.8)
        >>> link.latency_ms / 1e3 + 8e-9 * 10_000_000 / link.gbit_per_s  # seconds of 10 MB
        0.12
    """

    latency_ms: Annotated[float, Field(ge=0, le=1e9, examples=[48.1])]
    """Milliseconds, one way."""
    gbit_per_s: Positive = Field(examples=[0.188])
    """Bandwidth, one way."""


class PairLink(Link):
    """A link with its ends: one way (`from`, `to`) or the same both ways (the key that a subclass adds)."""

    source: str | None = Field(default=None, alias="from", examples=["Iowa"])
    """The end that sends, where the entry is for one way; it wins over an entry for both ways."""
    destination: str | None = Field(default=None, alias="to", examples=["London"])
    """The end that receives, where the entry is for one way."""

    @property
    def both_ways(self) -> NamePair | None:
        """The two ends where the entry holds in both directions."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _either_form(self) -> Self:
        one_way = [end for end in (self.source, self.destination) if end is not None]
        if len(one_way) != (2 if self.both_ways is None else 0):
            raise ValueError("give either both ends in one list (both ways) or from and to (one way)")
        return self

    def directions(self) -> tuple[NamePair, ...]:
        """Return the (source, destination) pairs that the entry describes."""
        if self.both_ways is not None:
            first, second = self.both_ways
            return ((first, second), (second, first)) if first != second else ((first, second),)
        return ((self.source or "", self.destination or ""),)


class RegionLink(PairLink):
    """The link from every node of one region to every node of another (or of the same).

    Examples:
        >>> RegionLink(regions=("Paris", "Turin"), latency_ms=12, gbit_per_s=0.5).directions()
        (('Paris', 'Turin'), ('Turin', 'Paris'))
        >>> one_way = RegionLink.model_validate({"from": "Paris", "to": "Turin", "latency_ms": 12, "gbit_per_s": 0.5})
        >>> one_way.directions()
        (('Paris', 'Turin'),)
    """

    regions: NamePair | None = Field(default=None, examples=[["Iowa", "London"]])
    """The two regions, where the link is the same both ways."""

    @property
    def both_ways(self) -> NamePair | None:
        """See `PairLink`."""
        return self.regions


class NodeLink(PairLink):
    """The link between two nodes.

    Examples:
        >>> NodeLink(nodes=("paris-0", "turin-1"), latency_ms=9, gbit_per_s=2).both_ways
        ('paris-0', 'turin-1')
    """

    nodes: NamePair | None = Field(default=None, examples=[["iowa-0", "london-1"]])
    """The two nodes, where the link is the same both ways."""

    @property
    def both_ways(self) -> NamePair | None:
        """See `PairLink`."""
        return self.nodes


class ClusterLinks(StrictModel):
    """All links. Every pair of nodes needs one: between the two nodes, else their regions, else the default.

    Examples:
        >>> links = ClusterLinks(contention="node", default=Link(latency_ms=5, gbit_per_s=1))
        >>> links.default.gbit_per_s
        1.0
    """

    contention: Contention = "link"
    """What carries one transfer at a time: every directed link; with node also every node's network card; or none.
    With shared it is every link, and all links share cards and uplinks fairly."""
    within_region: Link | None = Field(default=None, examples=[{"latency_ms": 1, "gbit_per_s": 17.2}])
    """The link between any two nodes of one region."""
    between_regions: tuple[RegionLink, ...] = Field(
        default=(), examples=[[{"regions": ["Iowa", "London"], "latency_ms": 48.1, "gbit_per_s": 0.188}]]
    )
    """Links between the nodes of two regions."""
    between_nodes: tuple[NodeLink, ...] = Field(
        default=(), examples=[[{"from": "iowa-0", "to": "london-1", "latency_ms": 45, "gbit_per_s": 0.5}]]
    )
    """Links between two nodes; they win over those between regions."""
    default: Link | None = Field(default=None, examples=[{"latency_ms": 100, "gbit_per_s": 0.1}])
    """The link of every pair that no other entry names."""
    card_gbit_per_s: Duplex | None = Field(default=None, examples=[10.0])
    """What every node's network card carries each way, with contention shared: a number, or {up: 1, down: 10}; any
    amount where not given."""
    uplink_gbit_per_s: dict[str, Duplex] = Field(default={}, examples=[{"Iowa": 2, "London": {"up": 0.5, "down": 2}}])
    """What joins each region to all others, with contention shared: a number for both ways, or one each; any amount for
    regions that are not named."""


class Cluster(StrictModel):
    """The content of a cluster file; node names are unique and every node reaches every other.

    Examples:
        >>> cluster = Cluster(
        ...     name="two cities",
        ...     nodes=(
        ...         Node(name="paris", region="Paris", count=2, compute_tflop_per_s=60, memory_gib=22),
        ...         Node(name="turin", region="Turin", count=2, compute_tflop_per_s=40, memory_gib=22),
        ...     ),
        ...     links=ClusterLinks(
        ...         within_region=Link(latency_ms=0.2, gbit_per_s=10),
        ...         between_regions=(RegionLink(regions=("Paris", "Turin"), latency_ms=12, gbit_per_s=0.5),),
        ...     ),
        ... )
        >>> [node.name for node in cluster.members()]
        ['paris-0', 'paris-1', 'turin-0', 'turin-1']
        >>> cluster.graph().edges["paris-0", "turin-1"]
        {'latency_s': 0.012, 'gbit_per_s': 0.5}
    """

    format: Literal["skippipe.cluster/1"] = "skippipe.cluster/1"
    """What kind of file this is, and of which version."""
    name: Name = Field(examples=["three-regions"])
    """Name of the cluster, for messages and reports."""
    nodes: Annotated[tuple[Node, ...], Field(min_length=1)] = Field(
        examples=[[{"name": "iowa", "region": "Iowa", "count": 3, "compute_tflop_per_s": 125, "memory_gib": 72}]]
    )
    """The nodes, in rank order."""
    links: ClusterLinks
    task_overhead_s: Seconds = Field(default=0.0, examples=[0.002])
    """For how long a node is busy after each task with handing over what the task needs and makes."""
    measured_for: MeasuredFor | None = Field(default=None, examples=[{"forward_tflop": 1.47, "dtype": "float32"}])
    """What forward_s, backward_s and loss_s were measured for; for another experiment they are scaled by its FLOP."""
    device: Device | None = Field(default=None, examples=["cpu"])
    """What the nodes compute on that do not say it themselves; cuda is assumed where nothing does."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (total := sum(node.count or 1 for node in self.nodes)) > MOST_NODES:
            raise ValueError(f"nodes: {total} nodes, of which a plan can have {MOST_NODES}; lower their count")
        names = [node.name for node in self.members()]
        if len(names) < 2:
            raise ValueError(f"nodes: a pipeline needs at least 2 nodes, there is {len(names)}")
        repeated = [name for name, times in Counter(names).items() if times > 1]
        if repeated:
            raise ValueError(f"nodes: the name {repeated[0]!r} is used twice; give each node its own")
        regions = list(dict.fromkeys(node.region for node in self.nodes))
        _check_ends("links.between_regions", "region", self.links.between_regions, regions)
        _check_ends("links.between_nodes", "node", self.links.between_nodes, names)
        self._check_capacities(regions)
        for _ in self.resolved_links():
            pass
        return self

    def _check_capacities(self, regions: list[str]) -> None:
        for region in self.links.uplink_gbit_per_s:
            if region not in regions:
                raise ValueError(f"links.uplink_gbit_per_s: unknown region {region!r}; {nearest(region, regions)}")
        if self.links.contention == "shared":
            return
        given = {
            "links.card_gbit_per_s": self.links.card_gbit_per_s,
            "links.uplink_gbit_per_s": self.links.uplink_gbit_per_s or None,
            **{f"card_gbit_per_s of node {node.name!r}": node.card_gbit_per_s for node in self.nodes},
        }
        for key, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{key} counts with links.contention shared only, which is {self.links.contention}; set that, or "
                    "leave the capacity out"
                )

    def members(self) -> tuple[Node, ...]:
        """Return every single node in rank order, `count` resolved."""
        return tuple(member for node in self.nodes for member in node.members())

    def devices(self) -> dict[str, Device]:
        """Return what each node computes on, `count` resolved."""
        return {node.name: self.device_of(node) for node in self.members()}

    def device_of(self, node: Node) -> Device:
        """Return what a node computes on: as it says, as the cluster says, or as is assumed."""
        return node.device or self.device or ASSUMED_DEVICE

    def cards(self) -> dict[str, Duplex]:
        """Return what the network card of each node carries, `count` resolved; those of any speed are left out."""
        cards = {node.name: node.card_gbit_per_s or self.links.card_gbit_per_s for node in self.members()}
        return {name: card for name, card in cards.items() if card is not None}

    def uplinks(self) -> tuple[Uplink, ...]:
        """Return what joins the regions to each other."""
        members = self.members()
        return tuple(
            Uplink(
                name=region, nodes=tuple(node.name for node in members if node.region == region), gbit_per_s=gbit_per_s
            )
            for region, gbit_per_s in self.links.uplink_gbit_per_s.items()
        )

    @property
    def has_times(self) -> bool:
        """Whether some node has measured times in place of a rate."""
        return any(node.forward_s is not None for node in self.nodes)

    def assumes_device(self, node: Node) -> bool:
        """Whether nothing says what the node computes on."""
        return node.device is None and self.device is None

    def on_device(self, device: Device) -> "Cluster":
        """Return the same cluster with all nodes on this device."""
        nodes = tuple(node.model_copy(update={"device": device}) for node in self.nodes)
        return self.model_copy(update={"nodes": nodes})

    def resolved_links(self) -> Iterator[tuple[str, str, Link]]:
        """Yield (source, destination, link) for every ordered pair of nodes; see the module for what wins.

        No link is faster than the cards and uplinks on its way. Raises ValueError, naming the pair and the remedy,
        where no entry applies.
        """
        between_nodes = _by_direction(self.links.between_nodes)
        between_regions = _by_direction(self.links.between_regions)
        members = self.members()
        capacities = SharedCapacities.of(self.cards(), self.uplinks())
        for source in members:
            for destination in members:
                if source is destination:
                    continue
                link = between_nodes.get((source.name, destination.name))
                link = link or between_regions.get((source.region, destination.region))
                if link is None and source.region == destination.region:
                    link = self.links.within_region
                link = link or self.links.default
                if link is None:
                    raise ValueError(_unreachable(source, destination))
                most = capacities.most_gbit_per_s(source.name, destination.name, link.gbit_per_s)
                if most < link.gbit_per_s:
                    link = Link(latency_ms=link.latency_ms, gbit_per_s=most)
                yield source.name, destination.name, link

    def graph(self) -> "nx.DiGraph[str]":
        """Return the nodes (attributes as in the file) and directed links (`latency_s`, `gbit_per_s`)."""
        graph: nx.DiGraph[str] = nx.DiGraph(name=self.name, contention=self.links.contention)
        for node in self.members():
            graph.add_node(node.name, **node.model_dump(exclude={"name", "count"}, exclude_none=True))
        for source, destination, link in self.resolved_links():
            graph.add_edge(source, destination, latency_s=link.latency_ms / 1e3, gbit_per_s=link.gbit_per_s)
        return graph


def load_cluster(path: str | Path) -> Cluster:
    """Read a cluster file.

    Args:
        path: The YAML file.

    Returns:
        The cluster.

    Raises:
        ProblemError: The file cannot be read or is wrong; the message names file, key and remedy of the first offence.

    Examples:
        >>> load_cluster(Path("configs/clusters/three-regions.yaml")).name
        'three-regions'
    """
    path = Path(path)
    return parse_yaml(Cluster, read_yaml(path, ProblemError), str(path), ProblemError)


def is_cluster_file(path: Path) -> bool:
    """Whether the YAML file at `path` describes a cluster (by its `format`, or by having `nodes`)."""
    content = read_yaml(path, ProblemError)
    return content.get("format") == FORMAT or "nodes" in content


def _by_direction(entries: Sequence[PairLink]) -> dict[NamePair, Link]:
    both_ways_first = sorted(entries, key=lambda entry: entry.both_ways is None)
    return {pair: entry for entry in both_ways_first for pair in entry.directions()}


def _check_ends(key: str, kind: str, entries: Sequence[PairLink], known: list[str]) -> None:
    seen: set[tuple[bool, NamePair]] = set()
    for index, entry in enumerate(entries):
        for source, destination in entry.directions():
            for end in (source, destination):
                if end not in known:
                    raise ValueError(f"{key}.{index}: unknown {kind} {end!r}; {nearest(end, known)}")
            if kind == "node" and source == destination:
                raise ValueError(f"{key}.{index}: {source} to itself; a link joins two nodes, name the other one")
            direction = (entry.both_ways is None, (source, destination))
            if direction in seen:
                raise ValueError(f"{key}.{index}: {source} to {destination} is given twice; keep one of them")
            seen.add(direction)


def _unreachable(source: Node, destination: Node) -> str:
    if source.region == destination.region:
        remedy = "links.within_region"
    else:
        remedy = f"links.between_regions for ({source.region}, {destination.region})"
    return f"node {destination.name!r} is unreachable from {source.name!r}: add {remedy} or links.default"
