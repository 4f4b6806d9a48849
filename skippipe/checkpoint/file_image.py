"""A safetensors file as it will lie on the disk, in memory that is allocated once and filled again for every save.

Filling it is the only moment at which training must stand still. Afterwards another thread writes it; hashing and
writing take one pass and let other threads run. The format: the length of a JSON header as 8 bytes, the header (name,
dtype, shape and place of every tensor), then the tensors' bytes.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from skippipe.checkpoint.reader import FileRecord
from skippipe.errors import CheckpointError

DTYPE_NAMES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CHUNK_BYTES = 4 * 2**20
ALIGNMENT = 8


class FileImage:
    """Holds the bytes of one file of tensors, whose names, shapes and dtypes stay the same from save to save."""

    def __init__(self, tensors: Mapping[str, Tensor], *, pinned: bool = False) -> None:
        self._layout = layout_of(tensors)
        prefix, places = header_of(tensors)
        end = sum(tensor.nbytes for tensor in tensors.values())
        self._bytes = torch.empty(len(prefix) + end, dtype=torch.uint8, pin_memory=pinned)
        self._bytes[: len(prefix)] = torch.frombuffer(bytearray(prefix), dtype=torch.uint8)
        content = self._bytes[len(prefix) :]
        self._copies = {
            name: content[begin:stop].view(tensors[name].dtype).view(tensors[name].shape)
            for name, (begin, stop) in places.items()
        }

    @property
    def size_bytes(self) -> int:
        """Bytes of the file, and of the memory that it takes here."""
        return self._bytes.nbytes

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the file of `tensors` would have the same layout."""
        return layout_of(tensors) == self._layout

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors' present values; copies from a device may still be under way until it is synchronised."""
        for name, tensor in tensors.items():
            self._copies[name].copy_(tensor, non_blocking=True)

    def view(self) -> memoryview:
        """Return the bytes of the file as they are now; they change with the next `fill`."""
        return memoryview(self._bytes.numpy())  # type: ignore[arg-type]  # numpy arrays are buffers from Python 3.12 on

    def write(self, path: Path) -> FileRecord:
        """Write the file, wait until it is on the disk and return its record; hashed on the way, not read again."""
        digest = hashlib.sha256()
        content = self.view()
        with path.open("wb", buffering=0) as stream:
            for begin in range(0, len(content), CHUNK_BYTES):
                chunk = content[begin : begin + CHUNK_BYTES]
                digest.update(chunk)
                written = 0
                while written < len(chunk):
                    written += stream.write(chunk[written:])
            os.fsync(stream.fileno())
        return FileRecord(size_bytes=self.size_bytes, sha256=digest.hexdigest())


def header_of(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return what stands before the tensors of a file, and from which byte after that to which each one lies.

    It is what the library safetensors itself writes. Raises `CheckpointError` for a dtype that cannot be stored.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    places, end = {}, 0
    # The widest dtypes first, so that every tensor begins at a multiple of its element's size.
    for name, tensor in sorted(tensors.items(), key=lambda entry: (-entry[1].dtype.itemsize, entry[0])):
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{name}: tensors of {tensor.dtype} cannot be stored; convert it")
        places[name] = end, end + tensor.nbytes
        end += tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": places[name],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, places


def layout_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Return name, dtype and shape of every tensor."""
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
