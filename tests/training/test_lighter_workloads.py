"""What an experiment is advised to change for less memory, and whose device the verdict is about."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import CLUSTER, make_experiment, small_plan

from skippipe.errors import InfeasibleError
from skippipe.planning.experiment_plan import plan_request
from skippipe.planning.workload.experiment_workload import experiment_workload
from skippipe.planning.workload.lighter_workloads import lighter_workloads, memory_advice
from skippipe_scheduler.plan.plan_memory import plan_memory

WIDE: dict[str, Any] = {"training": {"device": "auto", "micro_batch_size": 4, "sequence_length": 1024}}
LIGHT: dict[str, Any] = {"micro_batch_size": 1, "activation_checkpointing": "full", "dtype": "bfloat16"}
"""Nothing is left to try, which would take its time."""


def with_memory(folder: Path, memory_gib: float, keys: str = "") -> None:
    path = folder / "cluster.yaml"
    path.write_text(path.read_text().replace("memory_gib: 4", f"memory_gib: {memory_gib}") + keys)


def refusal(folder: Path, **sections: Any) -> str:
    with pytest.raises(InfeasibleError) as caught:
        plan_request(make_experiment(folder, **sections))
    return str(caught.value)


def test_the_verdict_is_that_of_the_nodes_not_of_the_machine_that_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_experiment(tmp_path)
    with_memory(tmp_path, 0.0003)
    auto: dict[str, Any] = {"training": LIGHT | {"device": "auto"}, "optimizer": {"backend": "zero_redundancy"}}
    verdicts = []
    for available in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        verdicts.append(refusal(tmp_path, **auto))
    assert verdicts[0] == verdicts[1]
    assert "(device cuda, assumed as the cluster file gives none)" in verdicts[0]
    assert "checkpoint copy" not in verdicts[0]
    with_memory(tmp_path, 0.0003, "device: cpu\n")
    of_file = refusal(tmp_path, **auto)
    assert "(device cpu) has" in of_file
    assert "checkpoint copy, messages and the work of a task" in of_file
    (tmp_path / "cluster.yaml").write_text(CLUSTER.replace("memory_gib: 4", "memory_gib: 0.0003"))
    assert refusal(tmp_path, **auto | {"training": LIGHT | {"device": "cpu"}}) == of_file
    assert "(device cuda) has" in refusal(tmp_path, **auto | {"training": LIGHT | {"device": "cuda"}})


def test_advice_is_what_suffices_and_what_is_not_done_yet(tmp_path: Path) -> None:
    make_experiment(tmp_path)
    with_memory(tmp_path, 0.0147)  # of 0.0208 that are needed
    message = refusal(tmp_path, **WIDE)
    assert "or set training.micro_batch_size to 2" in message
    assert "set training.activation_checkpointing to " in message
    for key in ("micro_batch_size to 1", "sequence_length", " and set"):
        assert key not in message


def test_nothing_is_advised_twice(tmp_path: Path) -> None:
    done = make_experiment(
        tmp_path, training=LIGHT | {"sequence_length": 2048}, optimizer={"backend": "zero_redundancy"}
    )
    advice = [option.advice for group in lighter_workloads(done).groups for option in group]
    assert advice == [f"set training.sequence_length to {length}" for length in (1024, 512, 256)]
    fresh = lighter_workloads(make_experiment(tmp_path, training={"micro_batch_size": 5, "dtype": "float32"}))
    assert [[option.advice for option in group] for group in fresh.groups] == [
        ["set training.micro_batch_size to 2", "set training.micro_batch_size to 1"],
        ["set training.activation_checkpointing to selective", "set training.activation_checkpointing to full"],
        ["set optimizer.backend to zero_redundancy"],
        ["set training.dtype to bfloat16"],
    ]
    assert [option.advice for option in fresh.last_resort] == [
        "set training.micro_batch_size to 1 and set training.activation_checkpointing to full and set "
        "optimizer.backend to zero_redundancy and set training.dtype to bfloat16"
    ]


def test_a_plan_that_is_there_is_advised_by_its_own_nodes(tmp_path: Path) -> None:
    experiment, plan = make_experiment(tmp_path, **WIDE), small_plan()
    of_gpus = memory_advice(experiment, plan, ["cuda"] * len(plan.nodes))
    estimates = plan_memory(plan, experiment_workload(experiment), dict.fromkeys(plan.nodes, "cuda"))
    fullest = max(estimates, key=lambda estimate: estimate.total_bytes)
    assert "set training.micro_batch_size to 2" in of_gpus(fullest, fullest.total_bytes - 1)
    assert list(of_gpus(fullest, 1)) == []
