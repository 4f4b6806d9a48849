"""Changes of an experiment that are tried out: those that help where something is scarce, and only new ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from skippipe.cli.commands.plan_command import what_binds
from skippipe.config.experiment_file import load_experiment
from skippipe.planning.experiment_plan import plan_request, solve_plan
from skippipe.planning.tried_changes import MEMORY, NOT_TRIED, what_helps
from skippipe_scheduler.solver.planner import solve_with_baselines

TINY = Path("configs/experiments/tiny.yaml")
CLUSTER = """
format: skippipe.cluster/1
name: two places
nodes:
  - {{name: near, count: 2, region: near, compute_tflop_per_s: {tflop_per_s}, {memory}}}
  - {{name: far, count: 2, region: far, compute_tflop_per_s: {tflop_per_s}, {memory}}}
links:
  contention: none
  within_region: {{latency_ms: 0.1, gbit_per_s: 10}}
  between_regions: [{{regions: [near, far], latency_ms: 1, gbit_per_s: {gbit_per_s}}}]
"""
SLOW_LINKS: dict[str, Any] = {"tflop_per_s": 10, "gbit_per_s": 0.01, "memory": "memory_gib: 4"}
SLOW_NODES: dict[str, Any] = {"tflop_per_s": 0.001, "gbit_per_s": 10, "memory": "max_in_flight: 1"}
OVERRIDES = (
    "pipeline.planner.max_evaluations=400",
    "pipeline.num_stages=2",
    "pipeline.skip_ratio=0",
    "training.num_microbatches=4",
)


def helpful(folder: Path, cluster: dict[str, Any], *overrides: str) -> str:
    path = folder / "cluster.yaml"
    path.write_text(CLUSTER.format(**cluster))
    experiment = load_experiment(TINY, [*OVERRIDES, f"cluster={path}", *overrides])
    request = plan_request(experiment)
    plan = solve_plan(request)
    return what_helps(experiment, plan, request.resolve(plan), limit_s=1.0)


def test_compression_helps_where_links_are_slow(tmp_path: Path) -> None:
    lines = helpful(tmp_path, SLOW_LINKS).splitlines()
    assert lines[0].startswith("What would help most, tried for as many samples, beside ")
    now_s = float(lines[0].split(" beside ")[1].split()[0])
    gains_s = []
    for line in lines[1:]:
        then_s, gain_s = (float(part.split()[0]) for part in line.rpartition(": ")[2].split(", "))
        assert then_s + gain_s == pytest.approx(now_s, abs=2e-4)
        gains_s.append(gain_s)
    assert gains_s == sorted(gains_s, reverse=True)
    assert any(line.startswith("  comm.") and "_compression=int8: " in line for line in lines[1:])
    compressed = ("comm.gradient_compression=int8", "comm.activation_compression=int8")
    assert "_compression" not in helpful(tmp_path, SLOW_LINKS, *compressed)


def test_memory_helps_where_it_is_short(tmp_path: Path) -> None:
    assert MEMORY in helpful(tmp_path, SLOW_NODES)


def test_nothing_is_compared_with_a_plan_that_has_relays(tmp_path: Path) -> None:
    nodes = [{"name": f"n{index}", "region": "r", "forward_s": 1, "backward_s": 2, "loss_s": 0.5} for index in range(4)]
    ring = [{"nodes": [f"n{index}", f"n{(index + 1) % 4}"], "latency_ms": 100, "gbit_per_s": 1} for index in range(4)]
    links = {"contention": "none", "between_nodes": ring, "default": {"latency_ms": 30_000, "gbit_per_s": 1}}
    cluster = {
        "name": "ring",
        "device": "cpu",
        "nodes": [node | {"max_in_flight": 4} for node in nodes],
        "links": links,
    }
    path = tmp_path / "cluster.yaml"
    path.write_text(json.dumps(cluster))
    overrides = ["pipeline.num_stages=4", "pipeline.skip_ratio=0.25", "pipeline.planner.max_evaluations=200"]
    experiment = load_experiment(TINY, [*overrides, f"cluster={path}"])
    result = solve_with_baselines(plan_request(experiment))
    assert result.plan.has_relays
    assert what_helps(experiment, result.plan, result.problem, limit_s=1.0) == NOT_TRIED
    bound_s = float(what_binds(result.problem, result.plan, 0.0).split(" no plan is shorter than ")[1].split()[0])
    assert bound_s <= result.plan.predicted.iteration_s
    assert float(what_binds(result.problem, result.full_pipeline, 0.0).split("shorter than ")[1].split()[0]) > bound_s
