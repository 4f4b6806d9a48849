"""Messages from every rank of a group to every other, all at once, instead of around a ring.

Gloo sends a message only once it has heard that the receiver waits for it. So receives are posted before there is
anything to send: on slow links a meeting of all ranks then takes one latency instead of two.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from skippipe.runtime.ranks.torch_errors import begun


class Waitable(Protocol):
    """Communication that has begun."""

    def wait(self) -> object:
        """Wait until it has ended."""


@dataclass(frozen=True)
class AllOf:
    """Several at a time."""

    works: Sequence[Waitable]

    def wait(self) -> None:
        """Wait until all have ended."""
        for work in self.works:
            work.wait()


class DirectReduceScatterAllGather:
    """The two halves of a sum: every rank adds up one row of all ranks, and sends its sums to the others.

    Of `rows` (R, n) of R ranks, row r goes to rank r, which answers all others with one row in its place. The caller
    fills `rows`, which begin as zeros. `tag` tells exchanges apart that are under way at a time; the next number is
    taken, too.
    """

    def __init__(self, width: int, dtype: torch.dtype, group: dist.ProcessGroup, tag: int) -> None:
        self.rows = torch.zeros(group.size(), width, dtype=dtype)
        self.received = torch.empty_like(self.rows)
        self._ends = _Ends(group)
        self._tag = tag
        self._parts = self._ends.receive(self.received, tag)
        # In place: a rank answers when it has all that is to be added up, of which our row is a part.
        self._answers = self._ends.receive(self.rows, tag + 1)

    def send_rows(self) -> Waitable:
        """Begin the first half. After it, row r of `received` (R, n) is what rank r sent to this one."""
        own = self._ends.own
        self.received[own] = self.rows[own]
        return AllOf([*self._parts, *self._ends.send(self.rows, self._tag)])

    def answer(self, row: Tensor) -> Waitable:
        """Begin the second half with this rank's row (n,). After it, row r of `rows` is what rank r answered."""
        own = self.rows[self._ends.own]
        own.copy_(row)
        return AllOf([*self._answers, *self._ends.send(own.expand_as(self.rows), self._tag + 1)])


class ReduceScatterAllGathers:
    """The exchanges of a group, by number; `width_of` says how long a row is for so many numbers."""

    def __init__(self, group: dist.ProcessGroup, dtype: torch.dtype, width_of: Callable[[int], int]) -> None:
        self._group, self._dtype, self._width_of = group, dtype, width_of
        self._posted: dict[int, DirectReduceScatterAllGather] = {}

    def post(self, sizes: Sequence[int]) -> None:
        """Post the receives of exchanges 0, 1, ... of these numbers; every rank of the group will begin them."""
        self._posted = {number: self._make(number, size) for number, size in enumerate(sizes)}

    def take(self, number: int, size: int) -> DirectReduceScatterAllGather:
        """Return the exchange that was posted, or a new one."""
        return self._posted.pop(number, None) or self._make(number, size)

    def _make(self, number: int, size: int) -> DirectReduceScatterAllGather:
        return DirectReduceScatterAllGather(self._width_of(size), self._dtype, self._group, 2 * number)


class DirectAllGather:
    """Tells every rank of a group what the others say. All ranks meet in the same order.

    A group has one meeting for each `first_tag`: another one's messages would end in receives that this one has posted.
    """

    def __init__(self, group: dist.ProcessGroup, first_tag: int = 0) -> None:
        self._ends = _Ends(group)
        self._first_tag = first_tag
        self._posted: dict[int, tuple[Tensor, list[Waitable]]] = {}

    def hear(self, own: Tensor) -> Tensor:
        """Send `own` (n,) to all; return what each rank said (R, n).

        The receives of the next meeting with as many bytes are posted at once; the tag is their number.
        """
        size_bytes = own.nbytes
        if size_bytes not in self._posted:
            self._posted[size_bytes] = self._post(size_bytes)
        rows, receives = self._posted.pop(size_bytes)
        sent = self._ends.send(_bytes(own).expand_as(rows), self._first_tag + size_bytes)
        AllOf([*receives, *sent]).wait()
        self._posted[size_bytes] = self._post(size_bytes)
        rows[self._ends.own] = _bytes(own)
        return rows.view(own.dtype)

    def _post(self, size_bytes: int) -> tuple[Tensor, list[Waitable]]:
        rows = torch.empty(self._ends.count, size_bytes, dtype=torch.uint8)  # (R, n bytes)
        return rows, self._ends.receive(rows, self._first_tag + size_bytes)


@dataclass(frozen=True)
class _Ends:
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
        return [
            begun(dist.irecv(_bytes(rows[rank]), group=self.group, group_src=rank, tag=tag)) for rank in self._others
        ]

    def send(self, rows: Tensor, tag: int) -> list[Waitable]:
        """Send each rank its row of (R, n)."""
        return [
            begun(dist.isend(_bytes(rows[rank]), group=self.group, group_dst=rank, tag=tag)) for rank in self._others
        ]


def _bytes(row: Tensor) -> Tensor:
    return row.view(torch.uint8)  # gloo does not know every dtype
