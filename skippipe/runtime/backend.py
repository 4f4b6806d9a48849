"""Which backend carries activations: NCCL where every rank has a GPU of its own, else gloo.

Control traffic and gradient sums stay on gloo in any case.
"""

import json
import socket
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from skippipe.errors import CommunicationError, ConfigError
from skippipe.runtime.context import DistributedContext

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
    devices = _all_devices(device, context, PrefixStore("device", context.store))
    obstacle = nccl_obstacle(devices)
    if obstacle and asked == "nccl":
        raise ConfigError(f"comm.backend: nccl cannot be used: {obstacle}")
    return "gloo" if obstacle else "nccl"


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


def _all_devices(device: torch.device, context: DistributedContext, store: PrefixStore) -> list[RankDevice]:
    """Tell the others what this rank computes on; return what every rank does."""
    own = RankDevice(_gpu(device), dist.is_nccl_available())
    failure = ""
    try:
        store.set_timeout(timedelta(seconds=context.timeout_s))
        store.set(str(context.rank), json.dumps(own))
        return [RankDevice(*json.loads(store.get(str(rank)))) for rank in range(context.world_size)]
    except RuntimeError as error:
        failure = str(error).splitlines()[0]
    raise CommunicationError(f"rank {context.rank} could not learn what the other ranks compute on: {failure}")


def _gpu(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    properties = torch.cuda.get_device_properties(device)
    return f"{socket.gethostname()} {properties.name} {properties.uuid}"
