"""Which backend carries activations: NCCL where every rank has a GPU of its own, else gloo.

Control traffic and gradient sums stay on gloo in any case.
"""

import socket
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from skippipe.errors import ConfigError
from skippipe.runtime.ranks.agreement import all_gather_json
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic

Backend = Literal["gloo", "nccl"]


class RankDevice(NamedTuple):
    """What one rank computes on: `gpu` identifies a GPU over all machines, "" is the CPU."""

    gpu: str
    has_nccl: bool


def choose_backend(
    asked: Literal["auto", "gloo", "nccl"], device: torch.device, context: DistributedContext
) -> Backend:
    """Return the backend for activations, the same on every rank; all ranks call this together.

    Raises `ConfigError`, on every rank, where NCCL was asked for and cannot be used.
    """
    if asked == "gloo" or context.store is None:
        return "gloo"
    own = RankDevice(_gpu(device), dist.is_nccl_available())

    def obstacle(answers: Sequence[Sequence[Any]]) -> str:
        return nccl_obstacle([RankDevice(*answer) for answer in answers])

    def check(answers: Sequence[Sequence[Any]]) -> None:
        if asked == "nccl" and (found := obstacle(answers)):
            raise ConfigError(f"comm.backend: nccl cannot be used: {found}")

    devices = all_gather_json(context, Topic.DEVICE, lambda: own, check=check)
    return "gloo" if obstacle(devices) else "nccl"


def nccl_obstacle(devices: Sequence[RankDevice]) -> str:
    """Say why ranks on these devices cannot use NCCL, and what to do; "" where they can."""
    for rank, device in enumerate(devices):
        if not device.gpu:
            return (
                f"rank {rank} computes on the CPU; set training.device: cuda where it has a GPU, or comm.backend: gloo"
            )
        if not device.has_nccl:
            return f"the PyTorch of rank {rank} is built without NCCL; install one with it, or set comm.backend: gloo"
    gpu, count = Counter(device.gpu for device in devices).most_common(1)[0]
    if count > 1:
        ranks = ", ".join(str(rank) for rank, device in enumerate(devices) if device.gpu == gpu)
        return f"ranks {ranks} share one GPU ({gpu}); give each rank its own, or set comm.backend: gloo"
    return ""


def _gpu(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    properties = torch.cuda.get_device_properties(device)
    return f"{socket.gethostname()} {properties.name} {properties.uuid}"
