"""How many bytes of tensors are alive, operation by operation, on fake tensors: nothing is computed or allocated."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveMemory(TorchDispatchMode):
    """While entered, counts every storage that an operation makes, once, until the last tensor on it is gone.

    What was there before, such as parameters, does not count.

    Memory that an operation takes and gives back inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):  # a view of a parameter is no new memory
                self._known.setdefault(tensor.untyped_storage(), 0)
        results = _run(function, args, kwargs or {})
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size_bytes = storage.nbytes()
        self._known[storage] = size_bytes
        self.live_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, size_bytes)

    def _forget(self, size_bytes: int) -> None:
        self.live_bytes -= size_bytes


def _run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call; the products of a mixture's experts know no other dtype than bfloat16 where nothing is computed."""
    fake = any(isinstance(argument, FakeTensor) for argument in args)
    if fake and function is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
        halves = [
            argument.bfloat16() if isinstance(argument, Tensor) and argument.is_floating_point() else argument
            for argument in args
        ]
        return torch.empty_like(function(*halves, **kwargs), dtype=args[0].dtype)
    return function(*args, **kwargs)
