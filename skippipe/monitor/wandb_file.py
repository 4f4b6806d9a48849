"""Which steps the files of a W&B run hold: run-ID.wandb, in LevelDB's log format behind a header of W&B's own.

Blocks of 32 KiB hold pieces of records: checksum (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last),
content. A record is a protocol buffer of wandb's. https://github.com/google/leveldb/blob/main/doc/log_format.md
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

MAGIC: Final = b":W&B"
HEADER_BYTES: Final = 7
BLOCK_BYTES: Final = 32 * 1024
PIECE: Final = struct.Struct("<IHB")
WHOLE, LAST = 1, 4


def recorded_steps(folder: Path, run_id: str) -> set[int]:
    """Return the steps in all files of a run in `folder` (wandb/), as far as they are whole.

    Raises OSError where one cannot be read, and what protocol buffers raise for one that is damaged.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    steps = set()
    for path in folder.glob(f"*run-*/run-{run_id}.wandb"):
        for content in _records(path.read_bytes()):
            items = Record.FromString(content).history.item
            steps |= {int(json.loads(item.value_json)) for item in items if item.nested_key[:] == ["_step"]}
    return steps


def _records(content: bytes) -> Iterator[bytes]:
    if content[: len(MAGIC)] != MAGIC:
        return
    at, pieces = HEADER_BYTES, b""
    while at + PIECE.size <= len(content):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        if left < PIECE.size:
            at += left
            continue
        _, length, kind = PIECE.unpack_from(content, at)
        at += PIECE.size
        if not kind or at + length > len(content):  # room that was never filled, or a cut end
            return
        pieces += content[at : at + length]
        at += length
        if kind in (WHOLE, LAST):
            yield pieces
            pieces = b""
