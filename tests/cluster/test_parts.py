"""The parts of a profile that need no other process: rounds, names, regions, memory, the file."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from skippipe.cluster.description import as_cluster, profile_table, write_cluster
from skippipe.cluster.links.host_pairs import representatives, rounds
from skippipe.cluster.location import RankLocation, node_names, sharing
from skippipe.cluster.node_memory import container_limit_bytes
from skippipe.cluster.profile import NodeReport, Profile, levelled
from skippipe.cluster.regions import regions
from skippipe.errors import ConfigError
from skippipe_scheduler.problem.cluster import Node, NodeLink, load_cluster


def place(host: str, device: str = "cpu", name: str | None = None) -> RankLocation:
    return RankLocation(host, host, f"{host}/net", f"{host}/{device}", name, None)


@given(count=st.integers(2, 13), concurrent=st.none() | st.integers(1, 4))
def test_every_pair_is_measured_once_in_disjoint_rounds(count: int, concurrent: int | None) -> None:
    ranks = [10 * rank for rank in range(count)]
    found = rounds(ranks, concurrent)
    assert sorted(tuple(sorted(pair)) for pairs in found for pair in pairs) == sorted(combinations(ranks, 2))
    for pairs in found:
        taking_part = [rank for pair in pairs for rank in pair]
        assert len(set(taking_part)) == len(taking_part)
        assert 1 <= len(pairs) <= (concurrent or count)
    if concurrent is None:
        assert len(found) == count - 1 + count % 2


def test_a_host_is_measured_by_its_first_ranks() -> None:
    places = [place("a"), place("b"), place("b"), place("a"), place("a"), place("c")]
    assert representatives(places) == ([(0, 3), (1, 2)], [0, 1, 5])
    assert [sharing(places, rank) for rank in range(6)] == [3, 2, 2, 3, 3, 1]
    assert sharing([place("a", "gpu-0"), place("a", "gpu-1")], 0) == 1


def test_names() -> None:
    assert node_names([place("a"), place("b"), place("b"), place("b", name="x")]) == ["a", "b-0", "b-1", "x"]
    with pytest.raises(ConfigError, match="ranks 0 and 2 are both called 'a'"):
        node_names([place("a"), place("b"), place("c", name="a")])


def test_equal_ranks_of_a_machine_are_equally_fast() -> None:
    places = [replace(place("lab"), machine=machine) for machine in "aaaabb"]
    reports: list[NodeReport] = [
        {"device": device, "threads": threads, "forward_s": seconds, "memory_gib": seconds}
        for device, threads, seconds in [("x", 1, 3.0), ("x", 1, 1.0), ("x", 1, 5.0), ("x", 2, 7.0), ("x", 1, 9.0)]
    ]
    reports.append({"device": "y", "threads": 1, "forward_s": 2.0, "memory_gib": 2.0})
    level = levelled(places, reports)
    assert [entry["forward_s"] for entry in level] == [3.0, 3.0, 3.0, 7.0, 9.0, 2.0]
    assert [entry["memory_gib"] for entry in level] == [3.0, 1.0, 5.0, 7.0, 9.0, 2.0]


def test_regions_are_chains_of_near_ranks() -> None:
    latency_s = {(0, 1): 0.03, (1, 2): 0.001, (2, 3): 0.0015, (1, 3): 0.0025, (0, 2): 0.03, (0, 3): 0.03}
    assert regions([None] * 4, latency_s) == ["region-0", "region-1", "region-1", "region-1"]
    assert regions([None] * 4, latency_s, near_s=0.0012) == ["region-0", "region-1", "region-1", "region-2"]
    assert regions([None, None, "Iowa", "Oregon"], latency_s) == ["region-0", "Iowa", "Iowa", "Oregon"]


@pytest.mark.parametrize(("limit", "used", "left"), [("1000", "300", 700), ("max", "300", None), ("200", "300", 1)])
def test_memory_of_a_container(tmp_path: Path, limit: str, used: str, left: int | None) -> None:
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(used + "\n")
    assert container_limit_bytes(tmp_path) == left
    assert container_limit_bytes(tmp_path / "nowhere") is None


def test_a_written_cluster_reads_the_same(tmp_path: Path) -> None:
    names = ["yes", "node: #2", "7"]  # names that YAML would take for something else
    nodes = tuple(
        Node(name=name, region="a", compute_tflop_per_s=1.5, memory_gib=2.0, peak_tflop_per_s=3.0) for name in names
    )
    links = tuple(
        NodeLink.model_validate({"from": source, "to": other, "latency_ms": 0.1 * index, "gbit_per_s": 1 + index})
        for index, (source, other) in enumerate((name, other) for name in names for other in names if name != other)
    )
    measured = Profile(nodes, links, 1e-4, tuple(map(place, names)), ("CPU",) * 3)
    nodes = (nodes[0].model_copy(update={"device": "cpu"}), *nodes[1:])
    cluster = as_cluster(replace(measured, nodes=nodes), "three nodes").model_copy(update={"device": "cuda"})
    write_cluster(tmp_path / "cluster.yaml", cluster, ["about", "these"])
    assert (tmp_path / "cluster.yaml").read_text().startswith("# about\n# these\nformat: ")
    assert load_cluster(tmp_path / "cluster.yaml") == cluster
    table = profile_table(measured)
    assert "1.5 TFLOP/s" in table
    assert "yes -> node: #2" in table
    assert "overhead of a task 0.1 ms" in table
