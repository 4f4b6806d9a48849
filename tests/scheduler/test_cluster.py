"""Cluster files: what they mean, and what is said about a wrong one."""

from pathlib import Path

import pytest

import skippipe
from skippipe_scheduler.errors import ProblemError
from skippipe_scheduler.problem.cluster import Cluster, is_cluster_file, load_cluster

REPOSITORY = Path(__file__).parents[2]
DEMO = Path(skippipe.__file__).parent / "cli" / "demo" / "cluster.yaml"
SHIPPED = [*sorted((REPOSITORY / "configs" / "clusters").glob("*.yaml")), DEMO]

GOOD = """
name: test
nodes:
  - {name: a, region: Iowa, compute_tflop_per_s: 2, memory_gib: 4}
  - {name: b, region: London, count: 2, forward_s: 0.1, backward_s: 0.2, loss_s: 0.05, max_in_flight: 3}
links:
  within_region: {latency_ms: 1, gbit_per_s: 16}
  between_regions:
    - {regions: [Iowa, London], latency_ms: 48, gbit_per_s: 0.2}
"""


def load(tmp_path: Path, text: str) -> Cluster:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return load_cluster(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_clusters_are_complete(path: Path) -> None:
    assert is_cluster_file(path)
    graph = load_cluster(path).graph()
    assert len(graph) >= 4
    assert graph.number_of_edges() == len(graph) * (len(graph) - 1)
    assert all(edge["latency_s"] >= 0 and edge["gbit_per_s"] > 0 for *_, edge in graph.edges(data=True))


def test_the_shipped_names_are_known() -> None:
    names = {path.stem for path in SHIPPED}
    assert names >= {"three-regions", "regions-12", "one-machine", "two-sites", "cluster"}


def test_regions_12_is_the_published_setting() -> None:
    cluster = load_cluster(REPOSITORY / "configs" / "clusters" / "regions-12.yaml")
    graph = cluster.graph()
    assert len(graph) == 20
    assert len({node.region for node in cluster.nodes}) == 12
    # Corrected slip: the source has 0.002 Gbit/s here.
    assert graph.edges["nl-0", "london-0"] == {"latency_s": 0.0048, "gbit_per_s": 2.08}
    assert graph.edges["london-0", "nl-1"] == graph.edges["nl-0", "london-0"]


@pytest.mark.parametrize(
    ("source", "destination", "table_ms", "table_gibyte_per_s"),
    [
        ("iowa-0", "oregon-1", 19.3, 0.09033203125),
        ("london-0", "iowa-2", 48.1, 0.0218505859375),
        ("oregon-0", "london-1", 64, 0.021240234375),
        ("iowa-0", "iowa-1", 1, 2.0),
    ],
)
def test_demo_keeps_the_ratio_of_transfer_to_task(
    source: str, destination: str, table_ms: float, table_gibyte_per_s: float
) -> None:
    edge = load_cluster(DEMO).graph().edges[source, destination]
    assert edge["latency_s"] == pytest.approx(table_ms / 1e3 / 29, rel=5e-3)
    published = 33_554_432 / (table_gibyte_per_s * 2**30) / 0.44
    here = 98_304 * 8e-9 / edge["gbit_per_s"] / 0.015
    assert here == pytest.approx(published, rel=5e-3)


def test_graph_has_the_attributes_of_nodes_and_links(tmp_path: Path) -> None:
    graph = load(tmp_path, GOOD).graph()
    assert list(graph) == ["a", "b-0", "b-1"]
    assert graph.nodes["a"] == {"region": "Iowa", "compute_tflop_per_s": 2.0, "memory_gib": 4.0}
    assert graph.nodes["b-1"]["max_in_flight"] == 3
    assert graph.edges["a", "b-1"] == {"latency_s": 0.048, "gbit_per_s": 0.2}
    assert graph.edges["b-0", "b-1"] == {"latency_s": 0.001, "gbit_per_s": 16.0}
    assert graph.graph["contention"] == "link"


def test_the_more_particular_link_wins(tmp_path: Path) -> None:
    text = GOOD + (
        "    - {from: London, to: Iowa, latency_ms: 48, gbit_per_s: 0.5}\n"
        "  between_nodes:\n"
        "    - {from: a, to: b-0, latency_ms: 7, gbit_per_s: 7}\n"
        "    - {nodes: [a, b-0], latency_ms: 8, gbit_per_s: 8}\n"
        "  default: {latency_ms: 9, gbit_per_s: 9}\n"
    )
    graph = load(tmp_path, text).graph()
    speed = {pair: edge["gbit_per_s"] for *pair_, edge in graph.edges(data=True) for pair in [tuple(pair_)]}
    assert speed == {
        ("a", "b-0"): 7.0,  # one way between nodes
        ("b-0", "a"): 8.0,  # both ways between nodes
        ("a", "b-1"): 0.2,  # both ways between regions
        ("b-1", "a"): 0.5,  # one way between regions
        ("b-0", "b-1"): 16.0,  # within the region
        ("b-1", "b-0"): 16.0,
    }


def test_a_region_can_have_its_own_inner_link_and_default_fills_the_rest(tmp_path: Path) -> None:
    text = GOOD.replace("[Iowa, London]", "[London, London]") + "  default: {latency_ms: 9, gbit_per_s: 9}\n"
    graph = load(tmp_path, text).graph()
    assert graph.edges["b-0", "b-1"]["gbit_per_s"] == 0.2
    assert graph.edges["a", "b-1"]["gbit_per_s"] == 9.0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: test", "nmae: test", r"unknown key 'nmae'; did you mean 'name'\?"),
        ("region: Iowa", "regoin: Iowa", r"unknown key 'nodes\.0\.regoin'; did you mean 'region'\?"),
        (
            "gbit_per_s: 16",
            "gbits: 16",
            r"unknown key 'links\.within_region\.gbits'; did you mean 'gbit_per_s'",
        ),
        ("regions: [", "zones: [", r"unknown key 'links\.between_regions\.0\.zones'"),
        ("name: test", "name: test\nname: again", "duplicate key name"),
        ("name: test", "name: [", "not valid YAML"),
        ("name: test", "format: skippipe.cluster/9\nname: test", r"format: .*'skippipe.cluster/1'"),
        (
            "gbit_per_s: 16",
            "gbit_per_s: -16",
            r"links\.within_region\.gbit_per_s: .*greater than or equal to.*-16",
        ),
        ("gbit_per_s: 16", "gbit_per_s: .nan", r"links\.within_region\.gbit_per_s: .*finite"),
        ("gbit_per_s: 16", "gbit_per_s: .inf", r"links\.within_region\.gbit_per_s: .*finite"),
        ("gbit_per_s: 16", "gbit_per_s: 1e300", r"links\.within_region\.gbit_per_s: .*less than or equal to"),
        (
            "links:",
            "links:\n  uplink_gbit_per_s: {Iowa: {up: 1, down: 1, latency: 3}}",
            r"unknown key 'links\.uplink_gbit_per_s\.Iowa\..*latency'; known are up, down",
        ),
        ("gbit_per_s: 16", "gbit_per_s: fast", r"links\.within_region\.gbit_per_s: .*number.*'fast'"),
        (
            "latency_ms: 48",
            "latency_ms: -1",
            r"links\.between_regions\.0\.latency_ms: .*greater than or equal",
        ),
        ("name: a,", "name: b-1,", "the name 'b-1' is used twice"),
        (
            "[Iowa, London]",
            "[Iowa, Londn]",
            r"between_regions\.0: unknown region 'Londn'; did you mean 'London'",
        ),
        (
            "[Iowa, London]",
            "[Iowa, Iowa]",
            r"node 'b-0' is unreachable from 'a': add .*\(Iowa, London\) or links\.d",
        ),
        ("regions: [Iowa, London]", "from: London, to: Iowa", "node 'b-0' is unreachable from 'a'"),
        (
            "  within_region: {latency_ms: 1, gbit_per_s: 16}\n",
            "",
            "'b-1' is unreachable from 'b-0': .*within_region",
        ),
        ("regions: [Iowa, London]", "from: Iowa", r"between_regions\.0: give either both ends"),
        ("regions: [Iowa, London]", "regions: [Iowa, London], to: Iowa", "give either both ends"),
        ("compute_tflop_per_s: 2, ", "", "node 'a': give either compute_tflop_per_s or all of"),
        (
            "compute_tflop_per_s: 2,",
            "compute_tflop_per_s: 2, loss_s: 1,",
            "give either compute_tflop_per_s or",
        ),
        (", loss_s: 0.05", "", "node 'b': give either compute_tflop_per_s or all of"),
        (", max_in_flight: 3", "", "node 'b': give either memory_gib or max_in_flight"),
        ("memory_gib: 4", "memory_gib: 4, max_in_flight: 1", "node 'a': give either memory_gib or"),
        ("count: 2", "count: 0", r"nodes\.1\.count: .*greater than or equal to 1"),
        ("links:", "links:\n  contention: much", r"links\.contention: .*'none', 'link', 'node' or 'shared'"),
        ("name: a,", "name: 2024-01-01, count: yes,", r"nodes\.0\.count: .*integer"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(ProblemError, match=message) as caught:
        load(tmp_path, GOOD.replace(old, new))
    assert str(caught.value).startswith(str(tmp_path / "cluster.yaml"))


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        (
            "    - {regions: [London, Iowa], latency_ms: 1, gbit_per_s: 1}\n",
            r"between_regions\.1: London to Iowa is given twice",
        ),
        (
            "  between_nodes: [{nodes: [a, b-9], latency_ms: 1, gbit_per_s: 1}]\n",
            r"between_nodes\.0: unknown node 'b-9'; did you mean 'b-",
        ),
        (
            "  between_nodes: [{nodes: [b-0, b-0], latency_ms: 1, gbit_per_s: 1}]\n",
            r"between_nodes\.0: b-0 to itself; a link joins two nodes",
        ),
    ],
)
def test_bad_links_are_named(tmp_path: Path, addition: str, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        load(tmp_path, GOOD + addition)


def test_one_node_is_no_cluster(tmp_path: Path) -> None:
    text = "name: x\nnodes: [{name: a, region: r, compute_tflop_per_s: 1, memory_gib: 1}]\nlinks: {}\n"
    with pytest.raises(ProblemError, match="at least 2 nodes, there is 1"):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "expected keys and values"),
        (b"\xff\xfe\x00", "cannot be read|not valid YAML"),
        (b"", "name: Field required"),
        (b"name: " + b"[" * 5000, "not valid YAML|nested too deeply"),
        (b"name: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_bytes(content)
    with pytest.raises(ProblemError, match=message):
        load_cluster(path)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match="no such file"):
        load_cluster(tmp_path / "none.yaml")
    with pytest.raises(ProblemError, match="cannot be read"):
        load_cluster(tmp_path)


def test_an_experiment_is_no_cluster_file(tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text("cluster: x.yaml\n")
    assert not is_cluster_file(path)
