"""Clusters over real regions of three clouds: round trips and throughput as measured, mixed cards, from a seed.

    python benchmarks/scheduler/geography.py --regions regions.csv --nodes 72 --seed 3 --out cluster.yaml

`regions.csv` is what the Skyplane project measured in January and February 2022 (`profiles/latency.csv`,
`skyplane/data/throughput.csv`; Apache-2.0), as `src,dst,rtt_ms,gbit_per_s_64_connections`.
"""

import csv
import random
from pathlib import Path
from typing import Any, Final

import click
import yaml

from skippipe_scheduler.errors import ProblemError
from skippipe_scheduler.files import parse
from skippipe_scheduler.problem.cluster import Cluster

NODES_OF_REGION: Final = 3
"""At least, while there are regions left."""
WINDOW_BYTES: Final = 4 * 2**20
"""What one TCP connection has under way at most: Linux's default for the largest send buffer (net.ipv4.tcp_wmem)."""
CARDS: Final = ((120.0, 48.0), (150.0, 80.0), (400.0, 80.0))
"""TFLOP/s and GiB of L40S, A100 and H100: a third to half of their peaks in bfloat16. Chosen."""
CARD_GBIT_PER_S: Final = 10.0
"""Of a node's network card. Chosen: what virtual machines of this kind are sold with at least."""
WITHIN: Final = {"latency_ms": 0.5, "gbit_per_s": CARD_GBIT_PER_S}

Links = dict[tuple[str, str], tuple[float, float]]


def regions_cluster(regions: Path, num_nodes: int, seed: int) -> Cluster:
    """Return a cluster of so many nodes in regions that the seed chooses.

    A pipeline sends each message over one connection. It carries what 64 together were measured to, but no more than a
    window in a round trip: 4 MiB in 150 ms are 0.22 Gbit/s, where 64 connections carried 4.3 (medians of all pairs).
    """
    generator, links = random.Random(seed), measured_links(regions)
    known = sorted({source for source, _ in links})
    chosen = generator.sample(known, min(len(known), max(2, num_nodes // NODES_OF_REGION)))
    nodes: list[dict[str, Any]] = []
    for index in range(num_nodes):
        tflop_per_s, memory_gib = generator.choice(CARDS)
        region = chosen[index * len(chosen) // num_nodes]
        name = f"{region.replace(':', '-')}-{index}"
        nodes.append({"name": name, "region": region, "compute_tflop_per_s": tflop_per_s, "memory_gib": memory_gib})
    between = [
        {"from": source, "to": sink, **_one_connection(*links[source, sink])}
        for source in chosen
        for sink in chosen
        if source != sink
    ]
    shared = {"contention": "shared", "card_gbit_per_s": CARD_GBIT_PER_S}
    content = {
        "name": f"geography-{num_nodes}-{seed}",
        "nodes": nodes,
        "links": {**shared, "within_region": WITHIN, "between_regions": between},
    }
    return parse(Cluster, content, f"{num_nodes} nodes, seed {seed}", ProblemError)


def measured_links(regions: Path) -> Links:
    """Return round trip in ms and Gbit/s of 64 connections between regions; raise where a pair of them has none."""
    links: Links = {}
    with regions.open(newline="") as stream:
        for row in csv.DictReader(stream):
            if row["rtt_ms"] and row["gbit_per_s_64_connections"]:
                links[row["src"], row["dst"]] = float(row["rtt_ms"]), float(row["gbit_per_s_64_connections"])
    ends = {source for source, _ in links}
    missing = [(a, b) for a in ends for b in ends if a != b and (a, b) not in links]
    if missing:
        raise ProblemError(f"{regions}: round trip or throughput from {missing[0][0]} to {missing[0][1]} is missing")
    return links


def _one_connection(rtt_ms: float, gbit_per_s: float) -> dict[str, float]:
    window_gbit_per_s = WINDOW_BYTES * 8e-9 / (rtt_ms / 1e3)
    return {"latency_ms": rtt_ms / 2, "gbit_per_s": round(min(gbit_per_s, window_gbit_per_s, CARD_GBIT_PER_S), 4)}


@click.command()
@click.option("--regions", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--nodes", type=click.IntRange(min=6), default=24, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Cluster file to write.")
def main(regions: Path, nodes: int, seed: int, out: Path) -> None:
    """Write a cluster file."""
    cluster = regions_cluster(regions, nodes, seed)
    out.write_text(yaml.safe_dump(cluster.model_dump(mode="json", by_alias=True, exclude_none=True), sort_keys=False))
    click.echo(f"{out}: {nodes} nodes in {len({node.region for node in cluster.nodes})} regions")


if __name__ == "__main__":
    main()
