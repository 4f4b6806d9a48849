"""Whether a run outlives its processes where nobody has said so, and what its copies take."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore
from training_runs import ALONE, make_experiment, small_plan

from skippipe.planning.copied_stages import copies_bytes, copies_line
from skippipe.planning.workload.experiment_workload import experiment_workload
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.training.recovery.recovery_choice import may_find_a_run, why_off
from skippipe_scheduler.problem.cluster import Device

NUM_NODES = 4
AUTO: dict[str, Any] = {"recovery": {"enabled": "auto"}}
SHARED: dict[str, Any] = {"backend": "zero_redundancy"}


def answers(folder: Path, device: Device = "cpu", **sections: Any) -> set[str | None]:
    """Return what the ranks of a run find, which must be the same."""
    store, experiment = HashStore(), make_experiment(folder, **sections)

    def ask(rank: int) -> str | None:
        context = DistributedContext(rank, NUM_NODES, 0, timeout_s=30.0, store=store)
        return why_off(experiment, context, [device] * NUM_NODES)

    with ThreadPoolExecutor(NUM_NODES) as pool:
        return set(pool.map(ask, range(NUM_NODES)))


def test_a_run_outlives_its_processes_where_each_has_its_own_launcher_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert answers(tmp_path, **AUTO) == {None}
    assert may_find_a_run(make_experiment(tmp_path, **AUTO))
    assert answers(tmp_path, **AUTO, optimizer=SHARED) == {None}
    assert may_find_a_run(make_experiment(tmp_path, **AUTO, optimizer=SHARED))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert answers(tmp_path, **AUTO) == {None}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert answers(tmp_path, **AUTO) == {"a launcher that runs 2 processes on a host ends all of them with one"}
    assert not may_find_a_run(make_experiment(tmp_path, **AUTO))
    assert answers(tmp_path, recovery={"enabled": True}) == {None}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (AUTO | {"optimizer": {"backend": "deepspeed_zero1"}}, "optimizer.backend deepspeed_zero1"),
        ({"recovery": {"enabled": "auto", "min_nodes": NUM_NODES}}, "recovery.min_nodes (4)"),
        ({"recovery": {"enabled": False}}, "recovery.enabled is false"),
        (AUTO | {"device": "cuda"}, "NCCL"),
    ],
)
def test_settings_that_recovery_refuses_turn_it_off(tmp_path: Path, sections: dict[str, Any], words: str) -> None:
    (reason,) = answers(tmp_path, **sections)
    assert reason is not None
    assert words in reason


def test_one_process_has_nobody_to_go_on(tmp_path: Path) -> None:
    assert why_off(make_experiment(tmp_path, **AUTO), ALONE, ["cpu"]) is not None


def test_plan_says_what_copies_of_stages_take(tmp_path: Path) -> None:
    plan = small_plan()
    sole = [stage.nodes[0] for stage in plan.stages if len(stage.nodes) == 1]
    taken = copies_bytes(make_experiment(tmp_path, **AUTO), plan)
    assert {*sole} <= taken.keys()
    node = max(taken, key=taken.__getitem__)
    assert f"more on {node} (recovery" in copies_line(make_experiment(tmp_path, **AUTO), plan, {})
    scarce = dict.fromkeys(plan.nodes, 2**20)
    assert ", which has 1 MiB left" in copies_line(make_experiment(tmp_path, **AUTO), plan, scarce)
    assert copies_line(make_experiment(tmp_path), plan, {}) == ""
    assert not copies_bytes(make_experiment(tmp_path, recovery={"enabled": True, "copy_interval": 0}), plan)
    with_gradients = make_experiment(tmp_path, recovery={"enabled": True, "copy_interval": 1})
    assert copies_bytes(with_gradients, plan)[node] > taken[node]


def test_shared_out_state_takes_a_copy_on_each_replica_alone(tmp_path: Path) -> None:
    plan = small_plan()
    shared, whole = make_experiment(tmp_path, **AUTO, optimizer=SHARED), make_experiment(tmp_path, **AUTO)
    workload, taken = experiment_workload(shared), copies_bytes(shared, plan)
    per_layer = workload.layer_copy_bytes + workload.layer_shared_bytes
    assert per_layer == experiment_workload(whole).layer_copy_bytes
    others = copies_bytes(whole, plan)
    (index, stage), *_ = ((index, stage) for index, stage in enumerate(plan.stages) if len(stage.nodes) > 1)
    embedding = workload.embedding_and_head_copy_bytes if index == 0 else 0
    part = plan.layers_per_stage[index] * per_layer // len(stage.nodes) + embedding
    assert {node: taken[node] - others.get(node, 0) for node in stage.nodes} == dict.fromkeys(stage.nodes, part)
    assert not copies_bytes(make_experiment(tmp_path, recovery={"copy_interval": 0}, optimizer=SHARED), plan)
