"""Memory as a run sees it: estimated before, measured while it runs, refused where it cannot fit."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._C._distributed_c10d import HashStore
from training_runs import ALONE, make_experiment, ranks_plan, small_plan, train_alone, train_on_ranks, write_inputs

from skippipe.cli.main import main
from skippipe.errors import InfeasibleError
from skippipe.model.activations.activation_memory import ActivationCase, ActivationMemory, activation_memory
from skippipe.monitor.live.run_status import read_status
from skippipe.monitor.metrics_file import read_metrics
from skippipe.monitor.report.reports import write_run_report
from skippipe.planning.workload import experiment_workload as workload_module
from skippipe.planning.workload.experiment_workload import experiment_workload, share_activation_memory
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.training.measurement.memory_report import check_room, estimate_memory
from skippipe.training.measurement.peak_memory import PeakMemory

CPU = torch.device("cpu")
MIB = 2**20


def test_peak_is_the_growth_also_of_what_was_given_back() -> None:
    before = np.ones(40 * MIB, dtype=np.uint8)  # not counted: it was there
    peak = PeakMemory(CPU)
    assert peak.read() < 8 * MIB
    block = np.ones(64 * MIB, dtype=np.uint8)
    assert block[-1] == before[-1]
    del block
    assert 60 * MIB < peak.read() < 80 * MIB
    assert peak.read() > 60 * MIB


def test_run_shows_estimate_and_peak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = make_experiment(tmp_path, training={"max_steps": 3})
    train_alone(experiment)
    (estimate,) = estimate_memory(experiment, PlanSet(small_plan()), ["cpu"])
    entries = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert {entry["memory/estimated_bytes"] for entry in entries} == {estimate.total_bytes}
    assert "checkpoint/blocked_s" in entries[2]
    (row,) = json.loads((tmp_path / "run" / "memory.json").read_text())["ranks"]
    assert row["estimated_bytes"] == estimate.total_bytes
    assert capsys.readouterr().out.count("memory by plan") == 2
    page = write_run_report(tmp_path / "run").read_text()
    assert "memory at its peak" in page


def test_rank_0_measures_the_activations_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment, store = make_experiment(tmp_path), HashStore()
    asked: list[ActivationCase] = []
    told: list[ActivationMemory] = []

    def measured(case: ActivationCase) -> ActivationMemory:
        asked.append(case)
        return activation_memory(case)

    monkeypatch.setattr(workload_module, "activation_memory", measured)
    monkeypatch.setattr(workload_module, "tell_activation_memory", lambda _, memory: told.append(memory))
    with ThreadPoolExecutor(3) as pool:
        contexts = [DistributedContext(rank, 3, rank, 10.0, store) for rank in range(3)]
        list(pool.map(partial(share_activation_memory, experiment), contexts))
    (case,) = asked
    assert told == [activation_memory(case)] * 3
    share_activation_memory(experiment, ALONE)
    assert len(asked) == 1


def test_frozen_weights_have_neither_gradients_nor_moments(tmp_path: Path) -> None:
    options = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
    whole = experiment_workload(make_experiment(tmp_path, model={"options": options}))
    adapted = experiment_workload(make_experiment(tmp_path, model={"options": options}, lora={"r": 4}))
    matrices = 4 * 128 * 128 + 3 * 128 * 256 + 2 * 128
    adapters = 4 * (4 * (128 + 128)) + 3 * 4 * (128 + 256)
    assert whole.layer_gradient_bytes == 4 * matrices
    assert adapted.layer_gradient_bytes == 4 * adapters
    assert adapted.embedding_and_head_gradient_bytes == 0
    assert whole.layer_state_bytes == 16 * matrices  # weight, gradient, two moments
    assert adapted.layer_state_bytes == 4 * matrices + 16 * adapters
    assert adapted.layer_copy_bytes == 12 * adapters
    assert adapted.embedding_and_head_state_bytes == whole.embedding_and_head_state_bytes // 4


@pytest.mark.slow
def test_every_rank_is_near_its_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
    training = {"max_steps": 3, "micro_batch_size": 2, "sequence_length": 128}
    experiment = make_experiment(tmp_path, model={"options": options}, training=training, checkpoint={"interval": 2})
    train_on_ranks(experiment, ranks_plan(), return_memory=True)
    entries = read_metrics(tmp_path / "run" / "metrics.jsonl")
    # In a process that has run other tests there may be none: what these have freed is used again.
    assert entries[-1]["memory/peak_bytes"] >= entries[0]["memory/peak_bytes"] > 0
    rows = json.loads((tmp_path / "run" / "memory.json").read_text())["ranks"]
    assert len(rows) == 3
    for row in rows:
        assert row["estimated_bytes"] > 80 * MIB
        assert 0.75 < row["peak_bytes"] / row["estimated_bytes"] < 1.5, row
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status.step, status.max_steps, status.loss) == (3, 3, entries[-1]["train/loss"])
    seen = [(node.node, node.stages, node.peak_bytes, node.estimated_bytes) for node in status.nodes]
    plan = ranks_plan()
    stages = [(plan.stage_of[node],) for node in plan.nodes]
    peaks, estimates = ([row[key] for row in rows] for key in ("peak_bytes", "estimated_bytes"))
    assert seen == list(zip(plan.nodes, stages, peaks, estimates, strict=True))
    visited = {node for microbatch in plan.microbatches for node in microbatch.route}
    for node in status.nodes:
        assert (node.busy_share > 0.05, node.pace is not None) == (node.node in visited,) * 2
        assert 0 <= node.waiting_share <= 1 - node.busy_share + 0.05
        assert (node.process_bytes > 80 * MIB, node.device_bytes) == (True, None)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["top", str(tmp_path / "run"), "--once"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[3:6]] == list(plan.nodes)
    assert "finished" in lines[0]


def test_plan_that_does_not_fit_is_refused_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = make_experiment(tmp_path)
    plan = small_plan()
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(cluster.read_text().replace("memory_gib: 4", "memory_gib: 0.0001"))
    estimates = estimate_memory(experiment, PlanSet(plan), ["cpu"] * len(plan.nodes))
    with pytest.raises(InfeasibleError, match=r"node 'node-\d' \(stage \d\) has 0\.102 MiB, but the plan needs"):
        check_room(experiment, plan, estimates, ALONE, ["cpu"] * len(plan.nodes))
    auto = make_experiment(tmp_path, training={"device": "auto"})
    with pytest.raises(InfeasibleError, match="device cpu, the cluster file has it as cuda: correct it and plan again"):
        check_room(auto, plan, estimates, ALONE, ["cpu"] * len(plan.nodes))
    arguments = write_inputs(experiment, plan, tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["plan", *arguments[:2]])
    assert stop.value.code == 3
    error = capsys.readouterr().err
    assert "raise its memory_gib to" in error
    assert len(error.splitlines()) == 1


def test_plan_says_which_node_is_fullest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = write_inputs(make_experiment(tmp_path), small_plan(), tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["plan", *arguments[:2]])
    assert not stop.value.code
    assert "memory: fullest is node-" in capsys.readouterr().out
