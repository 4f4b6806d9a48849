"""The profile of a cluster: all ranks measure together, and every one gets the same description."""

import logging
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch

from skippipe.cluster.compute_speed import (
    ProbeWorkload,
    copy_s,
    measure_tasks,
    measured_peak_tflop_per_s,
    sustained_tflop_per_s,
)
from skippipe.cluster.links.completion import Completion
from skippipe.cluster.links.link_rounds import (
    LinkOptions,
    MeasuredLink,
    measure_links,
    of_all_ranks,
    same_network,
    wait_for_all,
)
from skippipe.cluster.links.streams import Stream
from skippipe.cluster.location import RankLocation, node_names, own_location, sharing
from skippipe.cluster.node_memory import memory_bytes
from skippipe.cluster.regions import regions
from skippipe.cluster.rounding import rounded
from skippipe.model.device import device_name, peak_tflop_per_s
from skippipe.runtime.ranks.agreement import all_gather_json
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic
from skippipe_scheduler.problem.cluster import MeasuredFor, Node, NodeLink

logger = logging.getLogger(__name__)
GIB = 2**30
SPEEDS = ("compute_tflop_per_s", "forward_s", "backward_s", "loss_s", "peak_tflop_per_s")
NodeReport = dict[str, float | str]
"""What one rank says of its device."""


@dataclass(frozen=True)
class ProfileOptions:
    """What to measure and for how long."""

    workload: ProbeWorkload
    mean_layers: float | None
    """Layers of a stage of mean size; None where no experiment is given and nodes get a rate instead of times."""
    measured_for: MeasuredFor | None = None
    """What the times hold for; None where nodes get a rate."""
    num_losses: int = 1
    """How many losses an origin computes for a microbatch."""
    links: LinkOptions = field(default_factory=LinkOptions)
    compute_s: float = 3.0


@dataclass(frozen=True)
class LinkDetail:
    """What the link from one host to another does besides carrying one message; the hosts are named by a node.

    `stream` has no rates where a host's system cannot tell them.
    """

    source: str
    destination: str
    latency_ms: float
    jitter_ms: float
    stream: Stream | None


@dataclass(frozen=True)
class Profile:
    """What was measured, in a cluster file's terms; without links where there is one node."""

    nodes: tuple[Node, ...]
    links: tuple[NodeLink, ...]
    task_overhead_s: float
    places: tuple[RankLocation, ...]
    devices: tuple[str, ...]
    measured_for: MeasuredFor | None = None
    details: tuple[LinkDetail, ...] = ()
    """How the links between hosts differ from what a cluster file has of them."""
    completion: Completion | None = None
    """Where the bandwidth of some pairs of hosts was not measured."""


def profile(context: DistributedContext, device: torch.device, options: ProfileOptions) -> Profile:
    """Measure every rank's memory and compute, all at the same time as in training, then the links.

    All ranks call this together and get the same result. Raises `PeerLostError` where a rank stops.
    """
    found = all_gather_json(context, Topic.PROFILE_PLACE, lambda: asdict(own_location(device)))
    places = tuple(RankLocation(**content) for content in found)
    names = node_names(places)
    say = logger.info if context.rank == 0 else logger.debug
    say("computing on %d node%s at the same time, %g s", len(names), "s" * (len(names) > 1), options.compute_s)
    reports = _compute(context, device, options, sharing(places, context.rank))
    survey = measure_links(context, places, options.links)
    links = of_all_ranks(places, survey.links)
    calls_s = [link.call_s for link in links.values()]
    copies_s = [float(report["copy_s"]) for report in reports]
    nodes = _nodes(names, _regions(places, links, options), levelled(places, reports))
    return Profile(
        nodes=nodes,
        links=_node_links(names, links),
        task_overhead_s=rounded(statistics.median(copies_s) + statistics.median(calls_s)) if calls_s else 0.0,
        places=places,
        devices=tuple(str(report["device"]) for report in reports),
        measured_for=options.measured_for,
        details=tuple(_detail(names, link) for link in survey.links if not same_network(places, link)),
        completion=survey.completion,
    )


def _detail(names: Sequence[str], link: MeasuredLink) -> LinkDetail:
    return LinkDetail(
        names[link.source], names[link.destination], 1e3 * link.latency_s, 1e3 * link.jitter_s, link.stream
    )


def _compute(
    context: DistributedContext, device: torch.device, options: ProfileOptions, sharers: int
) -> list[NodeReport]:
    """Return what every rank says of its device; all of them compute from one moment on."""

    def measure() -> dict[str, float | str | None]:
        memory = memory_bytes(device, sharers)
        wait_for_all(context)
        times = measure_tasks(options.workload, device, options.compute_s)
        known = peak_tflop_per_s(device, options.workload.dtype)
        wait_for_all(context)
        peak = known / sharers if known else measured_peak_tflop_per_s(device, options.workload.dtype)
        report: dict[str, float | str | None] = {
            "device": device_name(device),
            "type": device.type,
            "threads": torch.get_num_threads(),
            "memory_gib": memory / GIB,
            "copy_s": copy_s(options.workload, device),
            "peak_tflop_per_s": peak,
        }
        if options.mean_layers is None:
            return report | {"compute_tflop_per_s": sustained_tflop_per_s(options.workload, times)}
        scale = options.mean_layers / options.workload.num_layers
        return report | {
            "forward_s": times.forward_s * scale,
            "backward_s": times.backward_s * scale,
            "loss_s": times.loss_s * options.num_losses,
        }

    return all_gather_json(context, Topic.PROFILE_COMPUTE, measure)


def _regions(
    places: Sequence[RankLocation], links: dict[tuple[int, int], MeasuredLink], options: ProfileOptions
) -> list[str]:
    latency_s = {pair: link.latency_s for pair, link in links.items()}
    return regions([place.given_region for place in places], latency_s, options.links.near_s)


def levelled(places: Sequence[RankLocation], reports: Sequence[NodeReport]) -> list[NodeReport]:
    """Return the reports, in which equal ranks of one machine have equal speeds: the medians of their own.

    What such ranks differ by is noise, which would give one of them more layers than the other.
    """
    alike: defaultdict[tuple[str, str, float], list[NodeReport]] = defaultdict(list)
    groups = []
    for place, report in zip(places, reports, strict=True):
        groups.append(alike[place.machine, str(report["device"]), float(report["threads"])])
        groups[-1].append(report)
    return [
        report | {key: statistics.median(float(member[key]) for member in group) for key in SPEEDS if key in report}
        for report, group in zip(reports, groups, strict=True)
    ]


def _nodes(names: Sequence[str], in_regions: Sequence[str], reports: Sequence[NodeReport]) -> tuple[Node, ...]:
    return tuple(
        Node.model_validate(
            {"name": name, "region": region, "device": report["type"]}
            | {key: rounded(float(report[key])) for key in (*SPEEDS, "memory_gib") if key in report}
        )
        for name, region, report in zip(names, in_regions, reports, strict=True)
    )


def _node_links(names: Sequence[str], links: dict[tuple[int, int], MeasuredLink]) -> tuple[NodeLink, ...]:
    return tuple(
        NodeLink.model_validate(
            {
                "from": names[source],
                "to": names[destination],
                "latency_ms": rounded(link.latency_s * 1e3),
                "gbit_per_s": rounded(link.gbit_per_s),
            }
        )
        for (source, destination), link in links.items()
    )
