"""Collectives in which every rank of a group sends to every other at once, instead of around a ring.

Around a ring, as gloo's own go, a message takes one latency for each rank; directly it takes the longest latency once.
Gloo sends a message only once it has heard that the receiver waits for it. So receives are posted before there is
anything to send: on slow links a collective then takes one latency instead of two.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from skippipe.runtime.ranks.whole_messages import Waitable, receive_whole, send_whole

AllReduce = TypeVar("AllReduce")
BROADCAST_TAG = 2**30
"""Above all that number the buckets of a sum, and below `groups.ABORT_TAG`."""


@dataclass(frozen=True)
class AllOf:
    """Several at a time."""

    works: Sequence[Waitable]

    def wait(self) -> None:
        """Wait until all have ended."""
        for work in self.works:
            work.wait()


class DirectReduceScatterAllGather:
    """One all-reduce as its two halves, a reduce-scatter and an all-gather; the caller computes in between.

    Reduce-scatter: of `rows` (R, n) on each of R ranks, row r is sent to rank r, which adds up what it gets.
    All-gather: every rank sends the row that it made of that to all others, which find it in `rows` as row r.
    The caller fills `rows`, which begin as zeros. `number` tells apart all-reduces that are under way at a time.
    """

    def __init__(self, width: int, dtype: torch.dtype, group: dist.ProcessGroup, number: int) -> None:
        tag = 2 * number
        self.rows = torch.zeros(group.size(), width, dtype=dtype)
        self.received = torch.empty_like(self.rows)
        self._peers = _Peers(group)
        self._tag = tag
        self._scattered = self._peers.receive(self.received, tag)
        # In place: a rank sends its result when it has all that is to be added up, of which our row is a part.
        self._gathered = self._peers.receive(self.rows, tag + 1)

    def scatter(self) -> Waitable:
        """Begin the first half. After it, row r of `received` (R, n) is what rank r sent to this one."""
        own = self._peers.own
        self.received[own] = self.rows[own]
        return AllOf([*self._scattered, *self._peers.send(self.rows, self._tag)])

    def gather(self, row: Tensor) -> Waitable:
        """Begin the second half with this rank's row (n,). After it, row r of `rows` is the one of rank r."""
        own = self.rows[self._peers.own]
        own.copy_(row)
        return AllOf([*self._gathered, *self._peers.send(own.expand_as(self.rows), self._tag + 1)])


class Posted(Generic[AllReduce]):
    """The all-reduces of a group, by number; `make` posts the receives of one of a number and a size."""

    def __init__(self, make: Callable[[int, int], AllReduce]) -> None:
        self._make = make
        self._posted: dict[int, AllReduce] = {}

    def post(self, sizes: Sequence[int]) -> None:
        """Post the receives of all-reduces 0, 1, ... of these sizes; every rank of the group will begin them."""
        self._posted = {number: self._make(number, size) for number, size in enumerate(sizes)}

    def take(self, number: int, size: int) -> AllReduce:
        """Return the all-reduce whose receives were posted, or a new one."""
        return self._posted.pop(number, None) or self._make(number, size)


def all_gather_text(group: dist.ProcessGroup, own: str) -> list[str]:
    """Return what each rank of a group says, in their order; all of them call this together. Nothing is unpickled."""
    content = own.encode()
    sizes = torch.empty(group.size(), dtype=torch.int64)  # (R,)
    dist.all_gather_into_tensor(sizes, torch.tensor([len(content)]), group=group)
    longest = int(sizes.max())
    texts = torch.empty(group.size() * longest, dtype=torch.uint8)  # (R x longest,), padded with blanks
    dist.all_gather_into_tensor(
        texts, torch.frombuffer(bytearray(content.ljust(longest)), dtype=torch.uint8), group=group
    )
    rows = texts.view(group.size(), longest)
    return [bytes(row[:size].tolist()).decode() for row, size in zip(rows, sizes.tolist(), strict=True)]


def begin_broadcast(tensor: Tensor, group: dist.ProcessGroup, source: int) -> list[Waitable]:
    """Begin to send a contiguous tensor of the rank `source` to all others, where it comes in the place of theirs.

    All ranks of the group begin the same broadcasts in the same order. On a GPU they go by way of the CPU.
    """
    if group.rank() == source:
        sent = tensor.cpu()
        return [send_whole(sent, group, peer, BROADCAST_TAG) for peer in range(group.size()) if peer != source]
    buffer = torch.empty_like(tensor, device="cpu") if tensor.device.type != "cpu" else tensor
    return [_Placed(receive_whole(buffer, group, source, BROADCAST_TAG), buffer, tensor)]


@dataclass(frozen=True)
class _Placed:
    """A message that is put into its place once it has come."""

    message: Waitable
    buffer: Tensor
    place: Tensor

    def wait(self) -> None:
        self.message.wait()
        if self.buffer is not self.place:
            self.place.copy_(self.buffer)


class DirectAllGather:
    """All-gathers of small tensors over one group, which all ranks begin in the same order.

    A group has one of these for each `first_tag`: the messages of another would end in receives that this one has
    posted.
    """

    def __init__(self, group: dist.ProcessGroup, first_tag: int = 0) -> None:
        self._peers = _Peers(group)
        self._first_tag = first_tag
        self._posted: dict[int, tuple[Tensor, list[Waitable]]] = {}

    def all_gather(self, own: Tensor) -> Tensor:
        """Send `own` (n,) to all; return what each rank sent (R, n).

        The receives of the next all-gather of as many bytes are posted at once; the tag is their number.
        """
        size_bytes = own.nbytes
        if size_bytes not in self._posted:
            self._posted[size_bytes] = self._post(size_bytes)
        rows, receives = self._posted.pop(size_bytes)
        sent = self._peers.send(as_bytes(own).expand_as(rows), self._first_tag + size_bytes)
        AllOf([*receives, *sent]).wait()
        self._posted[size_bytes] = self._post(size_bytes)
        rows[self._peers.own] = as_bytes(own)
        return rows.view(own.dtype)

    def _post(self, size_bytes: int) -> tuple[Tensor, list[Waitable]]:
        rows = torch.empty(self._peers.count, size_bytes, dtype=torch.uint8)  # (R, n bytes)
        return rows, self._peers.receive(rows, self._first_tag + size_bytes)


@dataclass(frozen=True)
class _Peers:
    """Sends and receives of this rank with all others of a group."""

    group: dist.ProcessGroup

    @property
    def own(self) -> int:
        return self.group.rank()

    @property
    def count(self) -> int:
        return self.group.size()

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self.count) if rank != self.own]

    def receive(self, rows: Tensor, tag: int) -> list[Waitable]:
        """Post the receives of rows (R, n)."""
        return [receive_whole(as_bytes(rows[rank]), self.group, rank, tag) for rank in self._others]

    def send(self, rows: Tensor, tag: int) -> list[Waitable]:
        """Send each rank its row of (R, n)."""
        return [send_whole(as_bytes(rows[rank]), self.group, rank, tag) for rank in self._others]


def as_bytes(row: Tensor) -> Tensor:
    """Return the same memory as bytes: gloo does not know every dtype."""
    return row.view(torch.uint8)
