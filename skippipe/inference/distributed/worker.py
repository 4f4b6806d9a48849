"""A process that runs its layers on what it is sent, and passes the result on."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from skippipe.errors import PeerLostError, SkipPipeError
from skippipe.inference.decoder import Decoder
from skippipe.inference.distributed.connections import Connections, Frame
from skippipe.inference.key_value_cache import RouteCache
from skippipe.runtime.ranks.remote_errors import error_content


class Worker:
    """Serves the layers of this process until the driver says that all is done."""

    def __init__(self, links: Connections, driver: int, device: torch.device) -> None:
        self._links, self._driver, self._device = links, driver, device
        self._decoder: Decoder
        self._caches: dict[int, RouteCache] = {}
        self._newest = 0

    def serve(self, load: Callable[[], Decoder]) -> int:
        """Load and serve; return the exit code that the driver ends with, also where loading failed.

        Raises `PeerLostError` where the driver is gone.
        """
        try:
            self._links.send(self._driver, {"here": True})
        except OSError as reason:
            raise self._driver_is_gone() from reason
        try:
            self._decoder = load()
        except SkipPipeError as error:
            self._tell_driver({"failed": error_content(error)})
        else:
            self._tell_driver({"ready": True})
        while True:
            received = self._links.receive()
            if received is None:
                continue
            rank, frame = received
            if frame is not None and "end" in frame.header:
                return int(frame.header["end"])
            if frame is not None:
                self._follow(frame)
            elif rank == self._driver:
                raise self._driver_is_gone()

    def _follow(self, frame: Frame) -> None:
        """Run one hop of a pass and send it on; one that was given up may still come in late."""
        order = frame.header
        if order["pass"] < self._newest:
            return
        self._newest = order["pass"]
        hop, hops = order["hop"], order["hops"]
        hidden = self._run(order, hops[hop][1], frame.tensors)  # (B, t, D)
        if hop + 1 == len(hops):
            self._tell_driver({"pass": order["pass"]}, {"hidden": hidden})
            return
        following = hops[hop + 1][0]
        report: dict[str, Any] = {"pass": order["pass"], "done": hop}
        try:
            self._links.send(following, order | {"hop": hop + 1}, frame.tensors | {"hidden": hidden})
        except OSError:
            report["unreachable"] = following
        self._tell_driver(report)

    def _tell_driver(self, header: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        """Send to the driver; where it has hung up, `serve` meets its last word or the end of the connection next."""
        with contextlib.suppress(OSError):
            self._links.send(self._driver, header, tensors)

    def _driver_is_gone(self) -> PeerLostError:
        return PeerLostError(f"rank {self._driver}, which drives the others, is gone; start all again")

    @torch.inference_mode()
    def _run(self, order: dict[str, Any], layers: list[int], tensors: dict[str, Tensor]) -> Tensor:
        here = {name: tensor.to(self._device) for name, tensor in tensors.items()}
        mask = here["attention_mask"].long() if "attention_mask" in here else None
        return self._decoder.run_layers(
            here["hidden"], tuple(layers), here["position_ids"], mask, self._cache(order, layers)
        )

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
