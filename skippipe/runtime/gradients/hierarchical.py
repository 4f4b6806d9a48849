"""Sums over replicas in several regions: within each region, between the regions, and back.

Lines between regions carry each number twice for a whole region, instead of twice for each of its replicas as in an
all-reduce from everyone to everyone. Two levels as in Goyal et al. 2017, section 4; lanes as in BlueConnect (Cho et al.
2019).
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from skippipe.runtime.gradients.collectives import AllOf, as_bytes
from skippipe.runtime.gradients.reduction import ExactSum
from skippipe.runtime.ranks.whole_messages import Waitable, receive_whole, send_whole

_TO_LANES, _SCATTER, _GATHER, _BACK = 0, 1, 2, 3
_STEPS = 4


class HierarchicalAllReduce(ExactSum):
    """The sum of numbers that travel in `dtype`; it is made in fp32, and all ranks end with the same one.

    With k regions, the smallest of L ranks, the first L ranks of each region are its lanes. A lane adds up 1/L of the
    numbers for its region. The same lanes of all regions add up 1/k of that each, and tell each other the sums, which
    then go back to all ranks of each region.
    """

    def __init__(self, group: dist.ProcessGroup, regions: Sequence[Sequence[int]], dtype: torch.dtype) -> None:
        super().__init__(lambda number, size: _RegionalExchange(group, regions, size, dtype, _STEPS * number))


class _RegionalExchange:
    """One all-reduce of `rows` (L, k, n), whose receives are posted. A lane adds up n numbers over all regions."""

    def __init__(
        self, group: dist.ProcessGroup, regions: Sequence[Sequence[int]], size: int, dtype: torch.dtype, first_tag: int
    ) -> None:
        self._group, self._first_tag = group, first_tag
        self._region = next(number for number, ranks in enumerate(regions) if group.rank() in ranks)
        self._near = regions[self._region]
        self._own = self._near.index(group.rank())
        num_lanes, num_regions = min(map(len, regions)), len(regions)
        width = -(-size // (num_lanes * num_regions))
        self._lanes = self._near[:num_lanes]
        self._same_lane = [ranks[self._own] for ranks in regions] if self._own < num_lanes else []
        self.rows = torch.zeros(num_lanes, num_regions, width, dtype=dtype)
        self._is_lane = bool(self._same_lane)
        count = len(self._near) if self._is_lane else 0
        self._of_region = torch.empty(count, num_regions, width, dtype=dtype)  # row r: what rank r of the region has
        self._of_regions = torch.empty(len(self._same_lane), width, dtype=dtype)  # row r: what region r has of our part
        self._sums = torch.empty(len(self._same_lane), width, dtype=dtype)  # row r: what region r adds up
        # In place: a lane sends its sums when it has all that is to be added up, of which our row is a part.
        self._receives = {
            _TO_LANES: self._posted(_TO_LANES, self._near, self._of_region),
            _SCATTER: self._posted(_SCATTER, self._same_lane, self._of_regions),
            _GATHER: self._posted(_GATHER, self._same_lane, self._sums),
            _BACK: self._posted(_BACK, self._lanes, self.rows),
        }

    def run(self) -> Iterator[Waitable]:
        """Begin one step after the other; each is resumed when it has ended."""
        yield self._sent(_TO_LANES, self._lanes, self.rows)
        if self._is_lane:
            self._of_region[self._own] = self.rows[self._own]
            parts = self._of_region.float().sum(0).to(self.rows.dtype)  # (k, n)
            yield self._sent(_SCATTER, self._same_lane, parts)
            self._of_regions[self._region] = parts[self._region]
            own = self._of_regions.float().sum(0).to(self.rows.dtype)  # (n,)
            yield self._sent(_GATHER, self._same_lane, own.expand_as(self._sums))
            self._sums[self._region] = own
            self.rows[self._own] = self._sums
        back = self._sums.expand(len(self._near), *self._sums.shape) if self._is_lane else self._sums[:0]
        yield self._sent(_BACK, self._near if self._is_lane else (), back)

    def _posted(self, step: int, peers: Sequence[int], rows: Tensor) -> list[Waitable]:
        """Post the receives of a step: from each of `peers` its row of (peers, ...); none where there are no rows."""
        return [
            receive_whole(as_bytes(row), self._group, peer, self._first_tag + step)
            for peer, row in zip(peers, rows, strict=False)
            if peer != self._group.rank()
        ]

    def _sent(self, step: int, peers: Sequence[int], rows: Tensor) -> Waitable:
        """Send each of `peers` its row of (peers, ...), and wait for what they send in this step."""
        sends = [
            send_whole(as_bytes(row), self._group, peer, self._first_tag + step)
            for peer, row in zip(peers, rows, strict=True)
            if peer != self._group.rank()
        ]
        return AllOf([*self._receives[step], *sends])
