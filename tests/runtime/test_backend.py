"""NCCL where it can be used; where it was asked for and cannot, every rank says why."""

from pathlib import Path

import pytest
from pydantic import ValidationError
from ranks import finish_ranks, make_config, make_experiment, start_ranks

from skippipe.runtime.ranks.backend import RankDevice, nccl_obstacle
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.runner_options import runner_options

FIRST, SECOND = RankDevice("host-a H100 1", has_nccl=True), RankDevice("host-a H100 2", has_nccl=True)
CPU = RankDevice("", has_nccl=True)


@pytest.mark.parametrize(
    ("devices", "obstacle"),
    [
        ([FIRST, SECOND], ""),
        (
            [FIRST, CPU],
            "rank 1 computes on the CPU; set training.device: cuda where it has a GPU, or comm.backend: gloo",
        ),
        ([FIRST, FIRST._replace(has_nccl=False)], "the PyTorch of rank 1 is built without NCCL; install one"),
        ([FIRST, SECOND, FIRST], "ranks 0, 2 share one GPU (host-a H100 1); give each rank its own"),
    ],
)
def test_what_stands_in_the_way_of_nccl(devices: list[RankDevice], obstacle: str) -> None:
    found = nccl_obstacle(devices)
    assert found.startswith(obstacle)
    assert bool(found) == bool(obstacle)


@pytest.mark.slow
def test_nccl_without_gpus_ends_every_rank_with_the_reason(tmp_path: Path) -> None:
    for code, errors in finish_ranks(start_ranks(tmp_path, "nccl", 2), timeout_s=60):
        assert code == 2, errors
        assert "comm.backend: nccl cannot be used: rank 0 computes on the CPU" in errors
        assert "Traceback" not in errors


def test_one_process_needs_no_backend() -> None:
    alone = DistributedContext(rank=0, world_size=1, local_rank=0, timeout_s=1.0)
    assert runner_options(make_experiment(), make_config(2), alone).backend == "gloo"


def test_contradictions_are_refused_when_the_experiment_is_read() -> None:
    with pytest.raises(ValidationError, match="executor: dynamic needs backend: gloo"):
        make_experiment(comm={"backend": "nccl", "executor": "dynamic"})
    with pytest.raises(ValidationError, match=r"emulation needs comm\.backend: gloo"):
        make_experiment(comm={"backend": "nccl"}, emulation={"links": True})
