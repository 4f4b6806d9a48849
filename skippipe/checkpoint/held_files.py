"""Which files of a checkpoint lie on this disk, where hosts share none: RUN/checkpoints/step-<n>/held.json.

Without that file all of them do.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field

from skippipe.errors import CheckpointError
from skippipe_scheduler.files import StrictModel, parse, read_json, write_atomically

HELD: Final = "held.json"
FileName = Annotated[str, Field(pattern=r"^(model|optimizer)-stage-\d+(-rank-\d+)?\.safetensors$")]


class HeldFiles(StrictModel):
    """What held.json holds."""

    format: Literal["skippipe.held/1"] = "skippipe.held/1"
    files: tuple[FileName, ...]


def held_files(checkpoint: Path, names: Collection[str]) -> list[str]:
    """Return which of the checkpoint's files should be here, sorted; raise `CheckpointError` where that is damaged."""
    path = checkpoint / HELD
    if not path.exists():
        return sorted(names)
    held = set(parse(HeldFiles, read_json(path, CheckpointError), str(path), CheckpointError).files)
    return sorted(held.intersection(names))


def note_held_files(checkpoint: Path, names: Collection[str]) -> None:
    """Write down which files are here."""
    write_atomically(checkpoint / HELD, HeldFiles(files=tuple(sorted(names))).model_dump_json(indent=1) + "\n")
