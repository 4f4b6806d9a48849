"""Which process this is, and how processes find each other: torchrun's environment, or one process alone."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from skippipe.errors import CommunicationError, ConfigError

NEEDED = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class DistributedContext:
    """The place of this process among all of them. `store` is None where it runs alone."""

    rank: int
    world_size: int
    local_rank: int
    timeout_s: float
    store: Store | None = None

    @classmethod
    def from_environment(
        cls,
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
        nodes: Sequence[str] = (),
        patience_s: float = 0.0,
        process_groups: bool = True,
    ) -> Self:
        """Read torchrun's variables and meet the other processes; without them, one process runs alone.

        The others may come `patience_s` later than the timeout, where they have work to do before.
        Where the launcher hands out ranks in any order, SKIPPIPE_NODE says which of `nodes` this process is; its rank
        is then the position of that name.
        Without `process_groups` they only share a store.
        Raises `ConfigError` where variables are missing and `CommunicationError` where the others do not come.
        """
        values = os.environ if environment is None else environment
        if "RANK" not in values:
            return cls(0, 1, 0, timeout_s)
        missing = [name for name in NEEDED if name not in values]
        if missing:
            raise ConfigError(f"RANK is set but {', '.join(missing)} not; start with torchrun, or unset RANK")
        try:
            rank, world_size = int(values["RANK"]), int(values["WORLD_SIZE"])
            local_rank = int(values.get("LOCAL_RANK", "0"))
        except ValueError as error:
            raise ConfigError(f"RANK, LOCAL_RANK and WORLD_SIZE must be numbers: {error}") from None
        if world_size == 1:
            return cls(rank, world_size, local_rank, timeout_s)
        own_rank = _rank_of_node(values, nodes, rank)
        store = _meet(rank, own_rank, world_size, timeout_s + patience_s, values, process_groups)
        return cls(own_rank, world_size, local_rank, timeout_s, store)

    def close(self) -> None:
        """Leave the process group; safe to call twice."""
        if dist.is_initialized():
            dist.destroy_process_group()
        self.store = None


def _rank_of_node(values: Mapping[str, str], nodes: Sequence[str], rank: int) -> int:
    name = values.get("SKIPPIPE_NODE")
    if not name or not nodes:
        return rank
    if name not in nodes:
        raise ConfigError(f"SKIPPIPE_NODE: the cluster has no node {name!r}; it has {', '.join(nodes)}")
    return nodes.index(name)


def _meet(
    launched_rank: int,
    rank: int,
    world_size: int,
    timeout_s: float,
    values: Mapping[str, str],
    process_groups: bool,
) -> Store:
    """Return the store of all ranks; initialise torch.distributed on gloo where `process_groups` are wanted.

    `launched_rank` decides who holds the store, because that process was started on the master's host.
    All pairs of ranks connect at once: with lazy connections the first irecv of a pair blocks until its peer posts
    too, and ranks that post receives ahead would wait for each other.
    """
    os.environ["TORCH_GLOO_LAZY_INIT"] = "0"
    timeout = timedelta(seconds=timeout_s)
    failure = None
    try:
        store, _, _ = next(iter(rendezvous("env://", launched_rank, world_size, timeout=timeout)))
        prefixed = PrefixStore("skippipe", store)
        if process_groups:
            dist.init_process_group("gloo", store=prefixed, rank=rank, world_size=world_size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        failure = str(error).splitlines()[0]
    if failure is not None:
        address = f"{values['MASTER_ADDR']}:{values['MASTER_PORT']}"
        raise CommunicationError(
            f"rank {rank} of {world_size} could not meet the others at {address} within {timeout_s:g} s: {failure}; "
            "check that all processes run and that the address can be reached from here"
        )
    return prefixed
