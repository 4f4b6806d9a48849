"""The device of a process."""

import pytest
import torch

from skippipe.errors import ConfigError
from skippipe.model.device import choose_device

HAS_GPU = torch.cuda.is_available()


def test_cpu_is_the_cpu_whatever_there_is() -> None:
    assert choose_device("cpu", 3) == torch.device("cpu")


@pytest.mark.skipif(HAS_GPU, reason="needs a machine without GPU")
def test_without_gpu() -> None:
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device cuda: this process sees no CUDA device; use 'cpu'"):
        choose_device("cuda")


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_ranks_share_gpus_in_turn() -> None:
    count = torch.cuda.device_count()
    assert choose_device("auto", count) == choose_device("cuda", 0) == torch.device("cuda", 0)
