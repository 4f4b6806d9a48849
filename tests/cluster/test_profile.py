"""`skippipe profile`: real processes measure each other, and the planner takes what they found."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_ranks import start_ranks

from skippipe.cli.commands.profile_command import prepare
from skippipe.cli.main import main
from skippipe.cluster.compute_speed import TaskTimes, probe_stage, sustained_tflop_per_s
from skippipe.config.experiment_file import load_experiment
from skippipe.model import compilation
from skippipe.planning.experiment_plan import plan_request
from skippipe.planning.measured_for import experiment_measured_for
from skippipe.planning.workload.experiment_workload import experiment_workload
from skippipe.runtime.ranks.context import DistributedContext
from skippipe_scheduler.plan.plan import parse_plan
from skippipe_scheduler.problem.cluster import load_cluster

LAYERS, STAGES = 5, 3
EXPERIMENT: dict[str, Any] = {
    "cluster": "cluster.yaml",
    "data": {"source": "python_stdlib", "max_bytes": 100_000},
    "model": {"options": {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "vocab_size": 300}},
    "pipeline": {"num_stages": STAGES, "planner": {"time_limit_s": 0.3}},
    "training": {"sequence_length": 16, "micro_batch_size": 2, "num_microbatches": 4, "device": "cpu", "threads": 1},
    "comm": {"timeout_s": 90},
}
FAST = ("--compute-s", "0.2", "--link-s", "0.1")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(EXPERIMENT))
    return path


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def test_what_three_ranks_measure_is_what_a_plan_promises(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "cluster.yaml"
    arguments = ["profile", "--out", out, "--config", config, *FAST]
    environments = [{"SKIPPIPE_NODE": "lab"}, {}, {"SKIPPIPE_NODE": "cloud", "SKIPPIPE_REGION": "Iowa"}]
    results = [rank.finish() for rank in start_ranks(tmp_path, [arguments] * 3, environments)]
    assert [code for code, _ in results] == [0, 0, 0], results
    assert "3 processes on 1 machine" in out.read_text()
    assert f"{LAYERS / STAGES:g} layers (llama)" in results[0][1]
    assert "3 processes" not in results[1][1]

    cluster = load_cluster(out)
    nodes = {node.name: node for node in cluster.members()}
    assert [*nodes][::2] == ["lab", "cloud"]
    assert nodes["cloud"].region == nodes["lab"].region == "Iowa"  # near each other, so of one region
    assert cluster.devices() == dict.fromkeys(nodes, "cpu")
    assert not any(map(cluster.assumes_device, nodes.values()))
    assert all(link.latency_ms < 100 for *_, link in cluster.resolved_links())
    assert len([*cluster.resolved_links()]) == 6
    assert 0 < cluster.task_overhead_s < 0.1

    experiment = load_experiment(config)
    assert cluster.measured_for == experiment_measured_for(experiment, STAGES)
    assert cluster.measured_for.about == f"{LAYERS / STAGES:.3g} layers (llama), 2 x 16 tokens"
    assert call("plan", "--config", config, "--out", tmp_path / "plan.json") == 0
    assert "WARNING" not in capsys.readouterr().err
    plan = parse_plan(tmp_path / "plan.json")
    costs = plan.costs
    assert costs.task_overhead_s == cluster.task_overhead_s
    for name, node in nodes.items():
        weight = plan.layers_per_stage[plan.stage_of[name]] * STAGES / LAYERS
        assert costs.forward_s[name] == pytest.approx(weight * (node.forward_s or 0))
        assert costs.backward_s[name] == pytest.approx(weight * (node.backward_s or 0))
        assert costs.loss_s[name] == node.loss_s
    activation_bytes = experiment_workload(load_experiment(config)).activation_bytes
    plan_request(load_experiment(config, ["training.micro_batch_size=8"]))
    assert "cluster.yaml: the times were measured for other tasks" in caplog.text
    for source, destination, link in cluster.resolved_links():
        seconds = link.latency_ms / 1e3 + 8e-9 * activation_bytes / link.gbit_per_s
        assert costs.transfer_s[source][destination] == pytest.approx(seconds)


def test_one_process_measures_itself(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("profile", "--config", config, "--out", tmp_path / "one.yaml", *FAST) == 0
    assert "is not written: one node has no links" in capsys.readouterr().out
    assert not (tmp_path / "one.yaml").exists()


def test_without_experiment_a_node_gets_a_rate(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("profile", "--device", "cpu", "--json", *FAST) == 0
    printed = json.loads(capsys.readouterr().out)
    (node,) = printed["nodes"]
    assert node["compute_tflop_per_s"] > 0
    assert node["peak_tflop_per_s"] > 0.3 * node["compute_tflop_per_s"]
    assert "forward_s" not in node
    assert printed["links"] == []
    assert printed["cluster_file"] is None


def test_one_rank_without_its_device_ends_all(tmp_path: Path) -> None:
    arguments = [["profile", "--out", tmp_path / "out.yaml", "--device", name] for name in ("cpu", "cuda")]
    results = [rank.finish() for rank in start_ranks(tmp_path, arguments, [{"CUDA_VISIBLE_DEVICES": ""}] * 2)]
    assert [code for code, _ in results] == [2, 2], results
    assert "[rank 1] skippipe: error: device cuda: this process sees no CUDA device; use 'cpu'" in results[1][1]
    assert "error: rank 1: device cuda: this process sees no CUDA device" in results[0][1]
    assert not any("Traceback" in output for _, output in results)


def test_two_ranks_of_one_name(tmp_path: Path) -> None:
    arguments = ["profile", "--out", tmp_path / "out.yaml", "--device", "cpu"]
    results = [rank.finish() for rank in start_ranks(tmp_path, [arguments] * 2, [{"SKIPPIPE_NODE": "lab"}] * 2)]
    assert [code for code, _ in results] == [2, 2], results
    assert "ranks 0 and 1 are both called 'lab'; give each process its own SKIPPIPE_NODE" in results[0][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training.threads=1"], "overrides need --config"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--link-s", "0"], "link-s"),
    ],
)
def test_bad_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("profile", *arguments) == 2
    assert message in capsys.readouterr().err


def test_several_ranks_need_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = [rank.finish() for rank in start_ranks(tmp_path, [["profile"]] * 2, [{}] * 2)]
    assert [code for code, _ in results] == [2, 2], results
    assert "--out: give the cluster file to write" in results[0][1]


def test_what_is_measured_is_built_as_a_run_builds_it(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward beside adapters takes half as long: no gradients of the weights."""
    compiled: list[tuple[int, ...]] = []
    monkeypatch.setattr(compilation, "warm_up", lambda stage, shape, device: compiled.append(shape))
    alone = DistributedContext(rank=0, world_size=1, local_rank=0, timeout_s=1.0)
    backwards = []
    for overrides in ([], ["lora.r=2", "training.compile=true"]):
        device, options = prepare(load_experiment(config, overrides), "cpu", alone)
        workload = options.workload
        stage = probe_stage(workload, device)
        adapters = stage.adapters()
        assert bool(adapters) == bool(overrides)
        assert set(stage.trained_parameters()) == set(adapters or stage.global_parameters())
        assert [layer._compiled_call_impl is not None for layer in stage.layers] == [bool(overrides)] * 2
        backwards.append(sustained_tflop_per_s(workload, TaskTimes(forward_s=1.0, backward_s=1.0, loss_s=1.0)))
    assert backwards[1] < 0.8 * backwards[0]
    assert compiled == [(2, 16, 32)]
