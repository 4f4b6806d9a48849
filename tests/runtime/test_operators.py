"""Operators that a back-end lacks are named before the run; a peer that is gone is not one of them."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import preloaded
from torch._C._distributed_c10d import FileStore

from skippipe.errors import ConfigError
from skippipe.runtime.gradients.operators import check_operators
from skippipe.runtime.ranks.groups import ProcessGroups
from skippipe.runtime.ranks.torch_errors import TransferError


def run_rank(rank: int, folder: Path, gradient_dtype: torch.dtype, alone: bool) -> None:
    """Check the operators on two real ranks; write what came of it."""
    store = FileStore(str(folder / "store"), 2)
    os.environ["TORCH_GLOO_LAZY_INIT"] = "0"
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=20))
    groups = ProcessGroups(rank, dist.new_group(), dist.new_group(), dist.new_group(), dist.new_group(), (0, 1))
    dist.barrier()  # both have connected all groups
    if alone and rank == 1:
        os._exit(0)
    result = "passed"
    try:
        check_operators(groups, torch.bfloat16, gradient_dtype)
    except (ConfigError, TransferError) as error:
        result = f"{type(error).__name__}: {error}"
    (folder / f"result-{rank}").write_text(result)


def results(folder: Path, gradient_dtype: torch.dtype, *, alone: bool = False) -> list[str]:
    context = preloaded()
    processes = [context.Process(target=run_rank, args=(rank, folder, gradient_dtype, alone)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [path.read_text() for path in sorted(folder.glob("result-*"))]


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
def test_what_runs_use_is_there(tmp_path: Path, gradient_dtype: torch.dtype) -> None:
    assert results(tmp_path, gradient_dtype) == ["passed"] * 2


def test_a_missing_operator_is_named_with_its_remedy(tmp_path: Path) -> None:
    found = results(tmp_path, torch.quint8)  # gloo and torch sum no quantized numbers
    assert len(found) == 2
    for message in found:
        assert message.startswith(f"ConfigError: this torch ({torch.__version__}) cannot sum torch.quint8 gradients")
        assert "; set comm.gradient_dtype to float32, or install" in message


def test_a_lost_peer_is_not_a_missing_operator(tmp_path: Path) -> None:
    (message,) = results(tmp_path, torch.float32, alone=True)
    assert message.startswith("TransferError: tried to send torch.bfloat16 activations")
