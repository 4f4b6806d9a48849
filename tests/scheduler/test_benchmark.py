"""The planner's benchmark: its instances are repeatable, its rows run in processes, and results are kept row by row."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from processes import ForkedProcess, preloaded, run_program
from small_problems import make_problem

from skippipe_scheduler.errors import ProblemError
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.problem.problem import load_problem, write_problem
from skippipe_scheduler.solver.solve import SolveOptions, solve

FOLDER = Path(__file__).parents[2] / "benchmarks" / "scheduler"
INSTANCES = ("reference-20-nodes", "regions-18-nodes", "regions-64-nodes")


@pytest.fixture
def instances(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("instances")


def run(data: Path, out: Path, *arguments: str) -> str:
    command = [sys.executable, str(FOLDER / "run.py"), "--data", str(data), "--quick", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=170)
    assert done.returncode == 0, done.stderr
    return done.stdout


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((folder / "results.json").read_text())}


@pytest.mark.extended
def test_rows_are_measured_and_the_others_kept(tmp_path: Path) -> None:
    for name in INSTANCES:
        write_problem(make_problem(1, (2, 2, 1, 2), 3, 8), tmp_path / f"{name}.json")
    page = run(tmp_path, tmp_path, "--only", "published placement 30", "--only", "re-planning, other")
    assert "A quick run" in page
    found = results(tmp_path)
    assert [*found] == [
        "reference-20 published placement 30 s",
        "swaps against none, reference-20 published placement 30 s",
        "re-planning, other node lost 60 s",
    ]
    published, _, replanned = found.values()
    assert 0 < published["bound_s"] <= published["value"] < 33.6
    assert published["met"] is True
    assert published["time_limit_s"] == 4
    assert "fresh solve" in replanned["note"]

    (tmp_path / "regions-18-nodes.json").write_text("{}")
    run(tmp_path, tmp_path, "--only", "regions-18 300")
    found = results(tmp_path)
    assert [*found][1] == "regions-18 300 s"
    assert found["regions-18 300 s"]["error"] == "exit code 1"
    assert found["reference-20 published placement 30 s"] == published
    assert "| regions-18 300 s | gap ≤ 8% | exit code 1 | **no** |" in (tmp_path / "results.md").read_text()


CLUSTER = """
name: equal
nodes:
  - {name: east, count: 2, region: east, compute_tflop_per_s: 100, memory_gib: 8}
  - {name: west, count: 2, region: west, compute_tflop_per_s: 100, memory_gib: 8}
links:
  contention: node
  within_region: {latency_ms: 0.1, gbit_per_s: 100}
  between_regions: [{regions: [east, west], latency_ms: 20, gbit_per_s: 1}]
"""
EXPERIMENT = """
name: equal
cluster: {cluster}
model:
  options: {{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, vocab_size: 64}}
data: {{source: python_stdlib, tokenizer: bytes}}
pipeline: {{num_stages: 2, skip_ratio: 0}}
training: {{num_microbatches: 4, micro_batch_size: 1, sequence_length: 16, max_steps: 1}}
"""


@pytest.mark.extended
def test_experiments_on_clusters_are_planned_beside_the_full_pipeline(tmp_path: Path) -> None:
    clusters = tmp_path / "clusters"
    clusters.mkdir()
    (clusters / "c100.yaml").write_text(CLUSTER)
    for name in ("s16", "n100"):
        (clusters / f"{name}.yaml").write_text(EXPERIMENT.format(cluster="c100.yaml"))
    run(tmp_path, tmp_path, "--only", "64 equal nodes, no skips 2", "--only", "each card carries one")
    whole, equal = results(tmp_path).values()
    assert whole["name"] == "8B on 100 nodes, each card carries one message at a time 60 s"
    assert whole["value"] <= 1
    assert whole["met"] is False  # nothing is skipped
    assert "beside" in whole["note"]
    assert equal["met"] is True
    assert 0 < equal["bound_s"] <= equal["value"] < 0.0925


def test_no_such_row_is_said(tmp_path: Path) -> None:
    output, command = tmp_path / "output.txt", ["--data", str(tmp_path), "--only", "mars"]
    process = preloaded().Process(target=run_program, args=(FOLDER / "run.py", command, output, tmp_path))
    process.start()
    code, printed = ForkedProcess(process, output).finish(60)
    assert code == 2
    assert "no row's name contains 'mars'" in printed
    assert "regions-64 60 s" in printed


def test_drawn_problems_are_repeatable_and_can_be_planned(instances: ModuleType) -> None:
    problem, again, other = (instances.varied_problem(seed) for seed in (5, 5, 6))
    assert problem == again
    assert problem != other
    small = instances.Shape(num_nodes=12, num_stages=4, route_length=3, num_microbatches=12, num_regions=3)
    problem = instances.synthetic_problem(small, seed=2)
    assert len(problem.nodes) == 12
    validate(solve(problem, SolveOptions(max_evaluations=300)))


def test_a_drawn_problem_is_written_as_a_problem_file(instances: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "problem.json"
    command = [sys.executable, str(FOLDER / "instances.py"), "--seed", "7", "--out", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert load_problem(path) == instances.varied_problem(7)
    assert "synthetic, seed 7" in done.stdout


def test_clusters_over_regions_have_what_one_connection_carries(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    geography = importlib.import_module("geography")
    measured = {("a:x", "b:y"): "200,4", ("b:y", "a:x"): "200,0.1", ("a:x", "c"): "2,5", ("c", "a:x"): "2,50"}
    measured |= {("b:y", "c"): "50,2", ("c", "b:y"): "50,2"}
    lines = [f"{source},{sink},{values}" for (source, sink), values in measured.items()]
    path = tmp_path / "regions.csv"
    path.write_text("\n".join(["src,dst,rtt_ms,gbit_per_s_64_connections", *lines, "d,a:x,,3"]) + "\n")
    cluster = geography.regions_cluster(path, 9, seed=1)
    assert cluster == geography.regions_cluster(path, 9, seed=1)
    assert {node.region for node in cluster.nodes} == {"a:x", "b:y", "c"}
    links = {(link.source, link.destination): link for link in cluster.links.between_regions}
    found = {ends: (link.latency_ms, link.gbit_per_s) for ends, link in links.items()}
    assert found == {
        ("a:x", "b:y"): (100, 0.1678),  # 4 MiB in 0.2 s
        ("b:y", "a:x"): (100, 0.1),
        ("a:x", "c"): (1, 5),
        ("c", "a:x"): (1, 10),  # what the card carries
        ("b:y", "c"): (25, 0.6711),
        ("c", "b:y"): (25, 0.6711),
    }
    assert cluster.resolved_links()
    path.write_text("\n".join(["src,dst,rtt_ms,gbit_per_s_64_connections", *lines[1:], ""]))
    with pytest.raises(ProblemError, match="from a:x to b:y is missing"):
        geography.regions_cluster(path, 9, seed=1)
