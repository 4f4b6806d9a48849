"""The processes that serve a model, as the one that drives them sees them."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from skippipe.inference.depth_schedule import LayerSelection
from skippipe.inference.distributed.serving_group import ServingGroup

Hop = tuple[int, LayerSelection]
"""A rank and the layers that it runs."""


class WorkerPool:
    """Sends hidden states through other processes."""

    def __init__(self, group: ServingGroup) -> None:
        self.group = group
        self.first_number = group.epoch << 32
        """Passes and caches that are numbered from here on have other numbers than those of a driver before."""
        self._pass = self.first_number

    def run(self, hops: Sequence[Hop], order: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
        """Send `hidden` (B, t, D), one of `tensors`, along `hops`; return what comes back.

        Raises `NodeLostError` where one is lost that serves a stage. Of others that are lost nothing is seen here.
        """
        self._pass += 1
        group, changes = self.group, self.group.changes
        first = group.member(hops[0][0])
        group.links.send(first, {**order, "pass": self._pass, "hop": 0, "hops": hops}, tensors)
        answer: Tensor | None = None
        while True:
            if group.epoch_ends:  # also behind an answer: this process may have been silent until now, and left out
                group.next_epoch()
            if group.changes != changes:
                raise group.loss()
            if answer is not None:
                return answer
            frame = group.links.receive()
            if frame is not None and frame.header.get("pass") == self._pass:
                answer = frame.tensors.get("hidden")
