"""What a profile says: the text of a cluster file, and a table for people."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from skippipe.cluster.host_cards import with_cards
from skippipe.cluster.links.streams import SEVERAL
from skippipe.cluster.profile import LinkDetail, Profile
from skippipe_scheduler.files import StrictModel, write_atomically
from skippipe_scheduler.problem.cluster import FORMAT, Cluster, ClusterLinks
from skippipe_scheduler.problem.sharing.contention import Contention

MOST_LINKS = 20
"""Lines about links in the table."""


def as_cluster(profile: Profile, name: str, contention: Contention = "link") -> Cluster:
    """Return the profile as a cluster, with cards where contention is shared; there must be at least two nodes."""
    nodes, uplinks = with_cards(profile) if contention == "shared" else (profile.nodes, {})
    return Cluster(
        name=name,
        measured_for=profile.measured_for,
        nodes=nodes,
        links=ClusterLinks(contention=contention, uplink_gbit_per_s=uplinks, between_nodes=profile.links),
        task_overhead_s=profile.task_overhead_s,
    )


def write_cluster(path: Path, cluster: Cluster, comments: Sequence[str]) -> None:
    """Write a cluster file with `comments` at its head, a line for every node and link."""
    links = cluster.links
    lines = [*(f"# {comment}" for comment in comments), f"format: {FORMAT}", f"name: {_flow(cluster.name)}"]
    if cluster.device is not None:
        lines.append(f"device: {cluster.device}")
    if cluster.measured_for is not None:
        lines.append(f"measured_for: {_flow(content(cluster.measured_for))}")
    if cluster.task_overhead_s:
        lines.append(f"task_overhead_s: {cluster.task_overhead_s}")
    lines += ["nodes:", *(f"  - {_flow(content(node))}" for node in cluster.nodes)]
    lines += ["links:", f"  contention: {links.contention}"]
    for key in ("card_gbit_per_s", "within_region", "default"):
        if getattr(links, key) is not None:
            lines.append(f"  {key}: {_flow(content(getattr(links, key)))}")
    if links.uplink_gbit_per_s:
        uplinks = {region: content(gbit_per_s) for region, gbit_per_s in links.uplink_gbit_per_s.items()}
        lines.append(f"  uplink_gbit_per_s: {_flow(uplinks)}")
    for key in ("between_regions", "between_nodes"):
        if getattr(links, key):
            lines += [f"  {key}:", *(f"    - {_flow(content(entry))}" for entry in getattr(links, key))]
    write_atomically(path, "\n".join(lines) + "\n")


def content(entry: StrictModel) -> dict[str, Any]:
    """Return a node or link with the keys of a cluster file, its ends first."""
    fields = entry.model_dump(mode="json", by_alias=True, exclude_none=True)
    ends = {key: fields.pop(key) for key in ("from", "to", "nodes", "regions") if key in fields}
    return ends | fields


def profile_comments(profile: Profile, subject: str) -> list[str]:
    """Return when, where and how the numbers were measured."""
    hosts = list(dict.fromkeys(place.host for place in profile.places))
    machines = len({place.machine for place in profile.places})
    shown = ", ".join(hosts[:5]) + (f" and {len(hosts) - 5} more" if len(hosts) > 5 else "")
    lines = [
        f"Measured by skippipe profile on {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, on {shown}.",
        f"Task times: {subject}.",
    ]
    if machines < len(profile.nodes):
        where = f"{machines} machine{'s' * (machines > 1)}"
        lines.append(
            f"{len(profile.nodes)} processes on {where}: all computed at once, as in training, and share memory."
        )
    if profile.links:
        lines.append("Latency is half of a message's way there and back; bandwidth is that of one connection, one way.")
    if (completion := profile.completion) is not None:
        lines += [
            f"Bandwidth was measured for {completion.measured_pairs} of {completion.all_pairs} pairs of hosts; the "
            "rest is completed: the narrowest of way out, way in, and regions.",
            f"At {len(completion.relative_errors)} ways of pairs that were held back the completion is off by "
            f"{completion.median_error:.0%} (median), {completion.most_error:.0%} (9 of 10 are below).",
        ]
    return lines


def profile_table(profile: Profile) -> str:
    """Return nodes and links for people; of many links the slowest."""
    width = max(len(node.name) for node in profile.nodes)
    timed = profile.nodes[0].forward_s is not None
    head = f"{'forward':>11}{'backward':>11}{'loss':>11}" if timed else f"{'sustained':>17}"
    lines = [f"{'node':{width}}  {'region':12}{'memory':>11}{head}{'peak':>17}  device"]
    for node, device in zip(profile.nodes, profile.devices, strict=True):
        if timed:
            times = (node.forward_s, node.backward_s, node.loss_s)
            speed = "".join(f"{1e3 * (seconds or 0.0):>8.3g} ms" for seconds in times)
        else:
            speed = f"{node.compute_tflop_per_s:>9.3g} TFLOP/s"
        peak = f"{node.peak_tflop_per_s:>9.3g} TFLOP/s"
        memory = f"{node.memory_gib:>7.3g} GiB"
        lines.append(f"{node.name:{width}}  {node.region:12}{memory}{speed}{peak}  {device}")
    shown = sorted(profile.links, key=lambda link: (link.gbit_per_s, -link.latency_ms))[:MOST_LINKS]
    if shown:
        lines.append(f"{'link':{2 * width + 4}}{'latency':>11}{'bandwidth':>16}")
    for link in shown:
        ends = f"{link.source} -> {link.destination}"
        lines.append(f"{ends:{2 * width + 4}}{link.latency_ms:>8.3g} ms{link.gbit_per_s:>9.3g} Gbit/s")
    if len(profile.links) > len(shown):
        lines.append(f"({len(profile.links) - len(shown)} faster links are not shown)")
    lines += _details(profile.details)
    if profile.task_overhead_s:
        lines.append(f"overhead of a task {1e3 * profile.task_overhead_s:.3g} ms")
    return "\n".join(lines)


def _details(details: Sequence[LinkDetail]) -> list[str]:
    """Return what links between hosts carry on one and on several connections, those first that carry least."""
    streams = [(detail, detail.stream) for detail in details if detail.stream is not None]
    if not streams:
        return []
    shown = sorted(streams, key=lambda entry: entry[1].one_gbit_per_s)[:MOST_LINKS]
    ends = [f"{detail.source} -> {detail.destination}" for detail, _ in shown]
    width = max(map(len, ends)) + 2
    kinds = ("one", "both ways", f"{SEVERAL} at once", "both ways")
    lines = [
        f"{'TCP connections, Gbit/s':{width}}{'jitter':>11}{''.join(f'{kind:>12}' for kind in kinds)}{'resent':>9}"
    ]
    for words, (detail, stream) in zip(ends, shown, strict=True):
        rates = "".join(f"{rate:>12.3g}" for rate in stream.rates)
        lines.append(f"{words:{width}}{detail.jitter_ms:>8.2g} ms{rates}{stream.resent:>9.1%}")
    return lines


def _flow(entry: Any) -> str:
    text: str = yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip()
