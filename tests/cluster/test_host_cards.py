"""Network cards of a profile: what several connections have shown, and nothing where links do not lead through them."""

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

from skippipe.cluster.description import as_cluster, write_cluster
from skippipe.cluster.links.streams import Stream
from skippipe.cluster.location import RankLocation
from skippipe.cluster.profile import LinkDetail, Profile
from skippipe_scheduler.problem.cluster import Node, NodeLink, load_cluster
from skippipe_scheduler.problem.sharing.capacities import Duplex

UP = {"a": 0.02, "b": 0.1, "c": 1.0}
DOWN = {"a": 0.1, "b": 0.05, "c": 1.0}


def measured(hosts: Sequence[str], regions: Sequence[str]) -> Profile:
    nodes = tuple(
        Node(name=f"{host}{rank}", region=region, compute_tflop_per_s=1.0, memory_gib=1.0)
        for rank, (host, region) in enumerate(zip(hosts, regions, strict=True))
    )
    links = tuple(
        NodeLink.model_validate({"from": source.name, "to": other.name, "latency_ms": 20.0, "gbit_per_s": 0.01})
        for source, other in permutations(nodes, 2)
    )
    details = tuple(
        LinkDetail(
            first, second, 20.0, 0.1, Stream(hosts.index(first), hosts.index(second), 0.01, 0.01, rate, 0.01, 0, 1)
        )
        for first, second in permutations(sorted(set(hosts)), 2)
        for rate in (min(UP[first], DOWN[second]),)
    )
    places = tuple(RankLocation(host, host, host, host, None, None) for host in hosts)
    return Profile(nodes, links, 0.0, places, ("CPU",) * len(nodes), details=details)


def test_a_node_has_the_card_that_was_seen(tmp_path: Path) -> None:
    cluster = as_cluster(measured("abc", "xyz"), "three", "shared")
    assert cluster.cards() == {
        "a0": Duplex(up=0.02, down=0.1),
        "b1": Duplex(up=0.1, down=0.05),
        "c2": Duplex(up=0.1, down=0.1),  # nobody else is as fast
    }
    assert cluster.uplinks() == ()
    write_cluster(tmp_path / "cluster.yaml", cluster, [])
    assert load_cluster(tmp_path / "cluster.yaml") == cluster
    assert as_cluster(measured("abc", "xyz"), "three").cards() == {}


def test_processes_of_one_host_share_an_uplink() -> None:
    cluster = as_cluster(measured("aabc", "xxyz"), "four", "shared")
    assert cluster.cards().keys() == {"b2", "c3"}
    assert cluster.links.uplink_gbit_per_s == {"x": Duplex(up=0.02, down=0.1)}
    assert as_cluster(measured("aabc", "xxxz"), "four", "shared").links.uplink_gbit_per_s == {}
