"""A process that runs its layers on what it is sent, and passes the result on."""

from typing import Any

import torch
from torch import Tensor

from skippipe.inference.decoder import Decoder
from skippipe.inference.distributed.frame_links import Frame
from skippipe.inference.distributed.serving_group import ServingGroup
from skippipe.inference.key_value_cache import RouteCache
from skippipe.inference.task_progress import KnownSteps


class Worker:
    """Serves the layers of this process until all is done, or this process has to drive the others."""

    def __init__(self, group: ServingGroup, decoder: Decoder, device: torch.device) -> None:
        self.known = KnownSteps()
        """What the driver has done, as far as this process has heard: nothing where it could not take its place."""
        self._group, self._decoder, self._device = group, decoder, device
        self._caches: dict[int, RouteCache] = {}
        self._newest = (0, 0)
        """Pass and hop that came last."""

    def serve(self) -> None:
        """Serve until all end (`ServingGroup.end_code`), or this process drives.

        Raises `PeerLostError` where nobody can drive the others any more.
        """
        while self._group.end_code is None and not self._group.drives:
            if self._group.epoch_ends:
                self._group.next_epoch()
                continue
            frame = self._group.links.receive()
            if frame is not None and "step" in frame.header:
                self._take_note(frame)
            elif frame is not None:
                self._follow(frame)

    def _take_note(self, frame: Frame) -> None:
        step = frame.header
        if step["driver"] == self._group.driver:  # not one that was silent, and comes back
            self.known.add(step["step"], step["value"], frame.tensors.get("draws"))

    def _follow(self, frame: Frame) -> None:
        """Run one hop of a pass and send it on; one that was given up may still come in late, or one come twice."""
        order = frame.header
        hop, hops = order["hop"], order["hops"]
        if (order["pass"], hop) <= self._newest:
            return
        self._newest = (order["pass"], hop)
        hidden = self._run(order, hops[hop][1], frame.tensors)  # (B, t, D)
        if hop + 1 == len(hops):
            self._group.links.send(self._group.member(self._group.driver), {"pass": order["pass"]}, {"hidden": hidden})
        else:
            following = self._group.member(hops[hop + 1][0])
            self._group.links.send(following, order | {"hop": hop + 1}, frame.tensors | {"hidden": hidden})

    @torch.inference_mode()
    def _run(self, order: dict[str, Any], layers: list[int], tensors: dict[str, Tensor]) -> Tensor:
        here = {name: tensor.to(self._device) for name, tensor in tensors.items()}
        mask = here["attention_mask"].long() if "attention_mask" in here else None
        position_ids = torch.tensor(order["position_ids"], device=self._device)  # (B or 1, t)
        return self._decoder.run_layers(here["hidden"], tuple(layers), position_ids, mask, self._cache(order, layers))

    def _cache(self, order: dict[str, Any], layers: list[int]) -> RouteCache | None:
        """Return the cache that the pass belongs to, as far as the driver has got with it."""
        self._caches = {number: cache for number, cache in self._caches.items() if number in order["live"]}
        number = order["cache"]
        if number is None:
            return None
        if number not in self._caches:
            self._caches[number] = RouteCache(self._decoder.num_layers, order["capacity"])
        cache = self._caches[number]
        cache.seen = order["seen"]
        cache.forget(cache.seen, layers)
        return cache
