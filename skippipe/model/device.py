"""Which device a process computes on."""

import torch

from skippipe.errors import ConfigError


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device called `name`: `auto` (a GPU where there is one), `cpu` or `cuda`; ranks share GPUs in turn.

    Raises `ConfigError` where a GPU is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ConfigError(f"device {name}: this process sees no CUDA device; use 'cpu' or 'auto', or check the driver")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def uses_cuda(name: str) -> bool:
    """Whether the device called `name` is a GPU, as far as can be known from here."""
    return name == "cuda" or (name == "auto" and torch.cuda.is_available())
