"""A user's mistakes, through the command line: exit code, one clear message, nothing half-written."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from random_plans import random_plan

from skippipe.cli.main import main

CLUSTER: dict[str, Any] = {
    "name": "test",
    "nodes": [{"name": "n", "count": 4, "region": "A", "compute_tflop_per_s": 1.0, "memory_gib": 8}],
    "links": {"within_region": {"latency_ms": 1, "gbit_per_s": 1}},
}
EXPERIMENT: dict[str, Any] = {
    "cluster": "cluster.yaml",
    "data": {"source": "python_stdlib", "max_bytes": 100_000},
    "model": {"options": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 300}},
    "pipeline": {"num_stages": 3, "skip_ratio": 0.33, "planner": {"time_limit_s": 0.3}},
    "training": {"max_steps": 1, "sequence_length": 16, "num_microbatches": 4},
}


def write(folder: Path, cluster_file: dict[str, Any] | None = None, **changes: Any) -> Path:
    content = json.loads(json.dumps(EXPERIMENT))
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster_file or CLUSTER))
    (folder / "experiment.yaml").write_text(yaml.safe_dump(content))
    return folder / "experiment.yaml"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return int(stop.value.code or 0), captured.err


def change_cluster(**changes: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(CLUSTER)), **changes}


NODE = {"name": "n", "region": "A", "compute_tflop_per_s": 1.0, "memory_gib": 8}


@pytest.mark.parametrize(
    ("cluster", "expected"),
    [
        (change_cluster(nodes=[NODE, {**NODE, "name": "m", "region": "B"}]), "unreachable"),
        (change_cluster(links={"within_region": {"latency_ms": 1, "gbit_per_s": -1}}), "gbit_per_s"),
        (change_cluster(links={"within_region": {"latency_ms": float("nan"), "gbit_per_s": 1}}), "latency_ms"),
        (change_cluster(nodes=[NODE, NODE]), "'n' is used twice"),
        (change_cluster(nodes=[{**NODE, "speed": 3}]), "speed"),
        (change_cluster(links={"within_regions": {}}), "within_region"),
    ],
)
def test_bad_clusters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cluster: dict[str, Any], expected: str
) -> None:
    code, message = run(capsys, "plan", "--config", write(tmp_path, cluster), "--out", tmp_path / "plan.json")
    assert (code, expected in message) == (2, True), message
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("changes", "code", "expected"),
    [
        ({"pipeline": {"num_stages": 5}}, 2, "the model has 4"),
        ({"pipeline": {"skip_ratio": 0.8}}, 2, "skip"),
        ({"pipeline": {"num_stages": 4, "skip_ratio": 0.0, "stage_sizes": [1, 1, 1]}}, 2, "stage_sizes"),
        ({"pipeline": {"placement": [["n-0"], ["n-1"], ["n-9"]]}}, 2, "n-9"),
        (
            {"pipeline": {"num_stages": 4, "max_forward_jump": 1, "max_swaps": 0, "skip_ratio": 0.5}},
            3,
            "max_forward_jump",
        ),
        ({"model": {"architecture": "lama"}}, 2, "did you mean 'llama'"),
        ({"model": {"options": {"hiden_size": 8}}}, 2, "did you mean 'hidden_size'"),
        ({"training": {"max_step": 8}}, 2, "did you mean 'training.max_steps'"),
        ({"cluster": "nowhere.yaml"}, 2, "nowhere.yaml: no such file"),
    ],
)
def test_bad_experiments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], code: int, expected: str
) -> None:
    config = write(tmp_path, **changes)
    found, message = run(capsys, "plan", "--config", config, "--out", tmp_path / "plan.json")
    assert (found, expected in message) == (code, True), message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cluster.yaml", "experiment.yaml"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "--config", "nothing.yaml", "--out"),
        ("plan", "--config", "nothing.yaml", "--report"),
        ("simulate", "nothing.json", "--trace"),
        ("simulate", "nothing.json", "--churn", "nothing.csv", "--report"),
        ("evaluate", "nothing", "--plot"),
        ("evaluate", "nothing", "--save-choice"),
        ("report", "nothing", "--out"),
        ("profile", "--out"),
    ],
)
def test_a_folder_in_place_of_a_file_is_said_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    code, message = run(capsys, *arguments, tmp_path)
    assert code == 2
    assert f"'{arguments[-1]}': {tmp_path} is a folder; name a file in it" in message


@pytest.mark.parametrize("policy", ["full", "stages:0,2"])
def test_a_share_that_nobody_would_look_at_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], policy: str
) -> None:
    code, message = run(capsys, "generate", tmp_path, "--prompt", "x", "--policy", policy, "--keep", 0.5)
    assert code == 2
    assert f"--keep 0.5: --policy {policy} runs " in message
    assert "whatever the share; leave --keep out" in message


def test_too_little_memory_has_no_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = change_cluster(nodes=[{**CLUSTER["nodes"][0], "memory_gib": 0.0001}])
    code, message = run(capsys, "plan", "--config", write(tmp_path, small))
    assert code == 3
    assert "raise its memory_gib to" in message


def test_plan_for_another_number_of_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from skippipe.config.experiment_file import load_experiment
    from skippipe.errors import PlanError
    from skippipe.runtime.ranks.context import DistributedContext
    from skippipe.training.loop import open_trainer

    monkeypatch.chdir(tmp_path)
    plan = random_plan(0, num_stages=2, route_length=2, num_microbatches=4, layers_per_stage=2)
    ranks = [DistributedContext(0, 3, 0, 10.0), DistributedContext(5, 6, 0, 10.0)]  # more and fewer than nodes
    for rank in ranks:
        with (
            pytest.raises(PlanError, match=f"{rank.world_size} processes run but the plan has 5 nodes; start 5"),
            open_trainer(load_experiment(Path(write(tmp_path))), plan, rank),
        ):
            pass


def test_plan_for_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path)
    random_plan(0, num_stages=3, route_length=2, num_microbatches=4, layers_per_stage=2).save(tmp_path / "plan.json")
    arguments = ["train", "--config", config, "--plan", tmp_path / "plan.json", f"run_dir={tmp_path / 'run'}"]
    code, message = run(capsys, *arguments, "logging.wandb.mode=disabled")
    assert code == 2
    assert "6 layers" in message
    assert "4" in message


@pytest.mark.parametrize("damage", [lambda text: text[:-20], lambda text: text.replace('"F",0', '"B",0', 1)])
def test_truncated_or_edited_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any) -> None:
    path = tmp_path / "plan.json"
    path.write_text(damage(random_plan(0).to_json()))
    for arguments in (["simulate", path], ["validate", path]):
        code, message = run(capsys, *arguments)
        assert code == 2
        assert str(path) in message


def test_empty_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("")
    data = {"source": "text", "paths": [str(tmp_path / "empty.txt")], "cache_dir": str(tmp_path / "cache")}
    config = write(tmp_path, data=data)
    code, message = run(
        capsys, "train", "--config", config, f"run_dir={tmp_path / 'run'}", "logging.wandb.mode=disabled"
    )
    assert code == 2
    assert "is empty" in message
