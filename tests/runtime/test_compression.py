"""Sums over replicas in real processes: compressed, with error feedback, several buckets at a time."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import finish_ranks, make_experiment, start_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

from skippipe.config.experiment import PowerSgdOptions
from skippipe.runtime.gradients.compression import Int8Sum, PowerSgdSum, make_bucket_sum
from skippipe.runtime.gradients.hierarchical import HierarchicalAllReduce
from skippipe.runtime.gradients.reduction import BucketSum, DirectAllReduce, all_reduce_over_replicas, expect_sums
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.runner_options import RunnerOptions

WORLD_SIZE = 4
STEPS = 12
SHAPES = ((40, 30), (7,), (64, 64), (5, 3), (30, 40))
SMALL_BUCKETS_BYTES = 5000
START = 3
"""PowerSGD's exact iterations at the beginning."""

OPTIONS = RunnerOptions(1, 1, 1, torch.float32, torch.device("cpu"), sums_by_region=True)

MAKERS: dict[str, Callable[[dist.ProcessGroup], BucketSum]] = {
    "exact": DirectAllReduce,
    "unexpected": DirectAllReduce,
    "two regions": lambda group: make_bucket_sum(group, OPTIONS, ((0, 2), (1, 3))),
    "uneven regions": lambda group: HierarchicalAllReduce(group, ((3, 0, 1), (2,)), torch.float32),
    "three regions": lambda group: HierarchicalAllReduce(group, ((1,), (0, 3), (2,)), torch.float32),
    "regions in bfloat16": lambda group: HierarchicalAllReduce(group, ((0, 1), (2, 3)), torch.bfloat16),
    "bfloat16": lambda group: DirectAllReduce(group, torch.bfloat16),
    "int8": lambda group: Int8Sum(group, error_feedback=True),
    "int8-forgetful": lambda group: Int8Sum(group, error_feedback=False),
    "powersgd": lambda group: PowerSgdSum(group, PowerSgdOptions(rank=2, start_iteration=START), error_feedback=True),
}


def gradients_of(rank: int, step: int) -> list[Tensor]:
    """Return the same gradients at every step, but for the last matrix: low rank, and nothing at two steps."""
    generator = torch.Generator().manual_seed(rank)
    gradients = [torch.randn(shape, generator=generator) for shape in SHAPES]
    thin = torch.Generator().manual_seed(17)
    left, right = torch.randn(30, 2, generator=thin), torch.randn(2, 40, generator=thin)
    gradients[-1] = torch.zeros(30, 40) if step in (START, START + 1) else (rank + 1) * left @ right
    return gradients


def sum_all(folder: Path, context: DistributedContext) -> None:
    """Sum a series of gradients in every way; a rank's program."""
    group = dist.new_group(list(range(WORLD_SIZE)))
    for name, maker in MAKERS.items():
        bucket_sum = maker(group)
        assert isinstance(bucket_sum, HierarchicalAllReduce) == ("regions" in name)
        sums: dict[str, Tensor] = {}
        for step in range(STEPS):
            gradients = gradients_of(context.rank, step)
            if name != "unexpected":
                expect_sums(gradients, bucket_sum, SMALL_BUCKETS_BYTES)
            all_reduce_over_replicas(gradients, bucket_sum, bucket_bytes=SMALL_BUCKETS_BYTES)
            sums |= {f"{step}.{index}": gradient for index, gradient in enumerate(gradients)}
        save_file(sums, folder / f"{name}.{context.rank}.safetensors")


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Tensor]]]:
    """Return the sums of every way by rank."""
    folder = tmp_path_factory.mktemp("sums")
    results = finish_ranks(start_ranks(folder, f"{__name__}:sum_all", WORLD_SIZE), timeout_s=60)
    assert [code for code, _ in results] == [0] * WORLD_SIZE, results
    return {name: [load_file(folder / f"{name}.{rank}.safetensors") for rank in range(WORLD_SIZE)] for name in MAKERS}


def true_sum(step: int, index: int) -> Tensor:
    return torch.stack([gradients_of(rank, step)[index].double() for rank in range(WORLD_SIZE)]).sum(0)


def error(arrived: Tensor, step: int, index: int) -> float:
    """Return the error of a sum relative to it."""
    expected = true_sum(step, index)
    return float((arrived - expected).norm() / expected.norm().clamp_min(1e-9))


def error_of_mean(arrived: dict[str, Tensor], steps: range, index: int) -> float:
    """Return the relative error of the mean over steps: what training feels in the long run."""
    mean = torch.stack([arrived[f"{step}.{index}"].double() for step in steps]).mean(0)
    return error(mean, steps[0], index)


def test_all_replicas_have_the_same_sums(sums: dict[str, list[dict[str, Tensor]]]) -> None:
    for name, by_rank in sums.items():
        for key, tensor in by_rank[0].items():
            assert all(other[key].equal(tensor) for other in by_rank), (name, key)


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("exact", 1e-6),
        ("unexpected", 1e-6),
        ("two regions", 1e-6),
        ("uneven regions", 1e-6),
        ("three regions", 1e-6),
        ("regions in bfloat16", 1e-2),
        ("bfloat16", 5e-3),
        ("int8", 0.1),
    ],
)
def test_one_sum_is_near(sums: dict[str, list[dict[str, Tensor]]], name: str, bound: float) -> None:
    errors = [error(sums[name][0][f"0.{index}"], 0, index) for index in range(len(SHAPES))]
    assert max(errors) < bound
    assert max(errors) > bound / 50


def test_error_feedback_makes_up_for_what_was_left_out(sums: dict[str, list[dict[str, Tensor]]]) -> None:
    for index in range(len(SHAPES) - 1):
        fed_back = error_of_mean(sums["int8"][0], range(STEPS), index)
        forgotten = error_of_mean(sums["int8-forgetful"][0], range(STEPS), index)
        assert fed_back < 1.5 / STEPS * error(sums["int8"][0][f"0.{index}"], 0, index)
        assert forgotten > 4 * fed_back


def test_powersgd_begins_with_exact_sums_and_never_touches_vectors(sums: dict[str, list[dict[str, Tensor]]]) -> None:
    arrived = sums["powersgd"][0]
    for step in range(STEPS):
        for index, shape in enumerate(SHAPES):
            if step < START or len(shape) == 1 or index == 3:  # too small to shrink
                assert error(arrived[f"{step}.{index}"], step, index) < 1e-6


def test_powersgd_finds_matrices_of_low_rank_also_after_nothing(sums: dict[str, list[dict[str, Tensor]]]) -> None:
    arrived = sums["powersgd"][0]
    assert not arrived[f"{START}.4"].any()
    for step in range(START + 2, STEPS):
        assert error(arrived[f"{step}.4"], step, 4) < 1e-4


def test_powersgd_feeds_back_too(sums: dict[str, list[dict[str, Tensor]]]) -> None:
    arrived = sums["powersgd"][0]
    one = error(arrived[f"{START}.2"], START, 2)
    assert one > 0.5  # two of 64 columns cannot hold noise
    assert error_of_mean(arrived, range(START, STEPS), 2) < 0.9 * one


def test_what_gloos_threads_call_does_not_keep_the_group_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that is released in one of its own threads waits for that thread, and the process aborts."""
    held: list[object] = []
    then = torch._C.Future.then

    def noting(future: Any, callback: Callable[..., object]) -> object:
        held.extend(cell.cell_contents for cell in callback.__closure__ or ())
        return then(future, callback)

    monkeypatch.setattr(torch._C.Future, "then", noting)
    group: Any = dist.ProcessGroupGloo(HashStore(), 0, 1, timedelta(seconds=30))
    powersgd = PowerSgdSum(group, PowerSgdOptions(rank=2, start_iteration=START), error_feedback=True)
    for step in range(START + 1):
        all_reduce_over_replicas(gradients_of(0, step), powersgd)
    assert any(isinstance(cell, PowerSGDState) for cell in held), "torch has another way to continue a sum"
    assert not any(cell is group for cell in held)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"comm": {"gradient_compression": "int8", "gradient_dtype": "bfloat16"}}, "give one of the two"),
        ({"comm": {"activation_compression": "int8", "activation_dtype": "bfloat16"}}, "give one of the two"),
        ({"comm": {"gradient_compression": "int8"}, "optimizer": {"backend": "deepspeed_zero2"}}, "sums by itself"),
        ({"comm": {"gradient_dtype": "bfloat16"}, "optimizer": {"backend": "deepspeed_zero1"}}, "sums by itself"),
        (
            {"comm": {"gradient_compression": "int8"}, "pipeline": {"reduction": "hierarchical"}},
            "use pipeline.reduction",
        ),
        ({"comm": {"gradient_compression": "powersgd", "powersgd": {"start_iteration": 1}}}, "start_iteration"),
    ],
)
def test_what_does_not_go_together_is_refused(sections: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_experiment(**sections)
