"""Whether the back-end can do what the run will ask of it: each kind of message is tried once, small, before training.

Without this, an operator that a build of torch lacks would show only at its first use, in the middle of an iteration.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from skippipe.errors import ConfigError
from skippipe.runtime.gradients.collectives import DirectAllGather
from skippipe.runtime.gradients.reduction import DirectAllReduce, all_reduce_over_replicas
from skippipe.runtime.ranks.groups import ProcessGroups
from skippipe.runtime.ranks.torch_errors import TransferError, raising_outside

MISSING = re.compile(
    r"could not run|not implemented|not support|unsupported|invalid scalar type|no backend", re.IGNORECASE
)
"""How back-ends say that they lack something; other failures are a peer's."""
TAG = 2**31 - 2
CONTROL_TAG = 2**30
SIZE = 8


def check_operators(groups: ProcessGroups, activation_dtype: torch.dtype, gradient_dtype: torch.dtype) -> None:
    """Try the operators of an iteration on its groups; all ranks together.

    Raises `ConfigError` naming operator, dtype and remedy where one is missing, `TransferError` where a peer is.
    """
    others = tuple(rank for rank in range(dist.get_world_size()) if rank != groups.rank)
    for operator in _operators(groups, activation_dtype, gradient_dtype):
        raising_outside(operator.call, partial(operator.error, others))


@dataclass(frozen=True)
class _Operator:
    """Something that an iteration asks of the back-end: in words, how to do without it, and a small trial."""

    name: str
    remedy: str
    call: Callable[[], object]

    def error(self, others: Sequence[int], cause: str) -> Exception:
        """Return what a trial that failed by `cause` means: the operator is missing, or one of the others is."""
        if MISSING.search(cause):
            return ConfigError(f"this torch ({torch.__version__}) cannot {self.name}: {cause}; {self.remedy}")
        return TransferError(f"tried to {self.name}", others, cause)


def _operators(
    groups: ProcessGroups, activation_dtype: torch.dtype, gradient_dtype: torch.dtype
) -> Iterator[_Operator]:
    install = "install the torch that pyproject.toml asks for"
    for name, group in (("forward", groups.forward), ("backward", groups.backward)):
        task = f"send {activation_dtype} activations {name}"
        remedy = f"set comm.activation_dtype to float32, or {install}"
        yield _Operator(task, remedy, partial(_pass_on, group, activation_dtype))
    control = DirectAllGather(groups.control, CONTROL_TAG)
    for dtype in (torch.float64, torch.int64):
        call = partial(control.all_gather, torch.ones(SIZE, dtype=dtype))
        yield _Operator(f"exchange {dtype} between all ranks", install, call)
    if groups.replicas is not None:
        task = f"sum {gradient_dtype} gradients over the replicas of a stage"
        remedy = f"set comm.gradient_dtype to float32, or {install}"
        yield _Operator(task, remedy, partial(_sum_over_replicas, groups.replicas, gradient_dtype))


def _pass_on(group: dist.ProcessGroup, dtype: torch.dtype) -> None:
    """Send to the next rank and receive from the one before."""
    rank, count = dist.get_rank(), dist.get_world_size()
    message = torch.ones(SIZE, dtype=dtype).view(torch.uint8)
    incoming = dist.irecv(torch.empty_like(message), (rank - 1) % count, group=group, tag=TAG)
    outgoing = dist.isend(message, (rank + 1) % count, group=group, tag=TAG)
    for work in (incoming, outgoing):
        if work is not None:
            work.wait()


def _sum_over_replicas(group: dist.ProcessGroup, dtype: torch.dtype) -> None:
    all_reduce_over_replicas([torch.ones(SIZE)], DirectAllReduce(group, dtype))
