"""Weights on the disk as `save_pretrained` lays them out, in one file or in shards, written tensor by tensor."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from skippipe.checkpoint.file_image import header_of
from skippipe.checkpoint.huggingface.stored_tensors import INDEX_FILE
from skippipe.errors import CheckpointError

FILE_PATTERN: Final = "model{suffix}.safetensors"
SHARD_SIZE: Final = "50GB"
"""The default of `save_pretrained`."""


class WeightShards:
    """The files of a model's weights, open for writing while it is entered.

    `expected` are all tensors in the model's order, without data (on the meta device). Tensors are then put in any
    order, each once, so that none needs to be in memory with another.
    """

    def __init__(self, folder: Path, expected: Mapping[str, Tensor], shard_size: str = SHARD_SIZE) -> None:
        self._folder = folder
        self._missing = dict(expected)
        # Experts are parts of one storage here, whose size would count for each.
        own = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
        self._split = split_torch_state_dict_into_shards(own, filename_pattern=FILE_PATTERN, max_shard_size=shard_size)
        self._files: dict[str, IO[bytes]] = {}
        self._places: dict[str, int] = {}
        self._open = ExitStack()

    def __enter__(self) -> Self:
        for file_name, names in self._split.filename_to_tensors.items():
            header, places = header_of({name: self._missing[name] for name in names}, metadata={"format": "pt"})
            file = self._open.enter_context((self._folder / file_name).open("wb"))
            file.write(header)
            self._files[file_name] = file
            self._places |= {name: len(header) + begin for name, (begin, _) in places.items()}
        return self

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor at its place; raise `CheckpointError` for one that is not of the model, or there twice."""
        wanted = self._missing.pop(name, None)
        if wanted is None or wanted.shape != tensor.shape:
            raise CheckpointError(f"{name}: not a parameter of the model, or there twice")
        file = self._files[self._split.tensor_to_filename[name]]
        file.seek(self._places[name])
        # Bytes of a flat view: numpy has no bfloat16.
        file.write(tensor.to(wanted.dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def finish(self, num_parameters: int) -> None:
        """Write the index of several files; raise `CheckpointError` where a tensor is missing."""
        if self._missing:
            raise CheckpointError(f"{min(self._missing)}: missing")
        if self._split.is_sharded:
            total = {"total_parameters": num_parameters, **self._split.metadata}
            index = {"metadata": total, "weight_map": self._split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self._folder / INDEX_FILE).write_text(text, encoding="utf-8")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
