"""A decoder of which other processes hold layers; whoever uses it does not see that."""

from itertools import count, groupby
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from skippipe.errors import InputError, NodeLostError
from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import LayerSelection
from skippipe.inference.distributed.worker_pool import Hop, WorkerPool
from skippipe.inference.inference_run import InferenceRun
from skippipe.inference.key_value_cache import RouteCache
from skippipe.model.layer_halves import LayerOrHalf, index_of
from skippipe.model.skeleton import Skeleton


class DistributedDecoder(Decoder):
    """Runs its own layers, and sends hidden states through workers for the others. B rows, t positions, D hidden size.

    Every process keeps keys and values of the layers that it runs. They are lost with it: a cache that was begun before
    a loss is refused with `NodeLostError`, and the text has to be read again into a new one.
    """

    def __init__(self, skeleton: Skeleton, run: InferenceRun, workers: WorkerPool) -> None:
        super().__init__(skeleton, run.bounds, run.stage_nodes, protected_stages=run.protected_stages)
        self._workers, self._group = workers, workers.group
        self._stage_of = {layer: stage for stage, layers in enumerate(self.stages) for layer in layers}
        self._caches: WeakKeyDictionary[RouteCache, tuple[int, int]] = WeakKeyDictionary()
        """Number of each cache in use, and how often the holders had changed when it began."""
        self._numbers = count(workers.first_number)

    @property
    def absent_stages(self) -> frozenset[int]:
        """Stages that nobody can run, now."""
        return frozenset(range(len(self.stages))) - self._group.holders.keys()

    @property
    def layers(self) -> nn.ModuleList:
        """Raise `InputError`: they lie in several processes, and the modules here have no weights for most."""
        raise InputError(
            "the layers of this model lie in several processes and cannot be looked into; "
            "start one process without torchrun"
        )

    def is_here(self, layers: LayerSelection) -> bool:
        """Whether this process holds these layers."""
        return all(self._holder(layer) == self._group.rank for layer in layers)

    def embed(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        layers: LayerSelection = (),
        cache: RouteCache | None = None,
    ) -> Tensor:
        """Return the hidden states before the first layer, or after `layers`: (B, T) -> (B, T, D)."""
        if self.is_here(layers):
            return super().embed(input_ids, position_ids, attention_mask, layers=layers, cache=cache)
        return self.run_layers(super().embed(input_ids, position_ids), layers, position_ids, attention_mask, cache)

    def run_layers(
        self,
        hidden: Tensor,
        layers: LayerSelection,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: RouteCache | None = None,
    ) -> Tensor:
        """Run layers wherever they are, (B, t, D) -> (B, t, D); again where a replica takes over for a lost one.

        Raises `NodeLostError` where nobody holds one of the layers any more, or `cache` is lost in part.
        """
        while True:
            try:
                return self._walk(hidden, layers, position_ids, attention_mask, cache)
            except NodeLostError:
                if cache is not None or any(self._holder(layer) is None for layer in layers):
                    raise

    def _walk(
        self,
        hidden: Tensor,
        layers: LayerSelection,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        cache: RouteCache | None,
    ) -> Tensor:
        order = self._order(cache)
        hops: list[Hop] = []
        for rank, run in groupby(layers, key=self._holder):
            if rank is None:
                raise self._group.loss()
            hops.append((rank, tuple(run)))
        for is_own, chain in groupby(hops, key=lambda hop: hop[0] == self._group.rank):
            if is_own:
                for _, own in chain:
                    hidden = super().run_layers(hidden, own, position_ids, attention_mask, cache)
            else:
                places = {"position_ids": _position_ids(hidden, position_ids, order["seen"])}
                tensors = _tensors(hidden, attention_mask, order["seen"])
                hidden = self._workers.run(list(chain), order | places, tensors).to(self.device)
        return hidden

    def _order(self, cache: RouteCache | None) -> dict[str, Any]:
        """Return what others need to know of a cache; raise `NodeLostError` where a part of it is lost."""
        if cache is None:
            return {"cache": None, "seen": 0, "live": [number for number, _ in self._caches.values()]}
        if cache not in self._caches:
            self._caches[cache] = next(self._numbers), self._group.changes
        number, changes = self._caches[cache]
        if changes != self._group.changes:
            raise self._group.loss()
        live = [other for other, _ in self._caches.values()]
        return {"cache": number, "seen": cache.seen, "capacity": cache.capacity, "live": live}

    def _holder(self, layer: LayerOrHalf) -> int | None:
        return self._group.holders.get(self._stage_of[index_of(layer)])


def _position_ids(hidden: Tensor, position_ids: Tensor | None, seen: int) -> list[list[int]]:
    """Return the positions of `hidden` (B, t, D): rows of t, or one that is that of all."""
    if position_ids is None:
        return [list(range(seen, seen + hidden.shape[1]))]
    rows: list[list[int]] = position_ids[:, : hidden.shape[1]].tolist()
    return rows


def _tensors(hidden: Tensor, attention_mask: Tensor | None, seen: int) -> dict[str, Tensor]:
    """Return what travels; padding is a byte a position, (B, seen + t)."""
    last = seen + hidden.shape[1]
    return {"hidden": hidden} | ({} if attention_mask is None else {"attention_mask": attention_mask[:, :last].bool()})
