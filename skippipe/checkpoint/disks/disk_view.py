"""What one disk has of a checkpoint, and what several have together."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from skippipe.checkpoint.held_files import FileName, held_files
from skippipe.checkpoint.reader import METADATA, Metadata, check_hash, check_size, read_metadata_alone
from skippipe.checkpoint.soundness import what_is_wrong
from skippipe.errors import CheckpointError
from skippipe_scheduler.files import StrictModel, parse, parse_json, read_text

LayerRange = tuple[int, int]
"""First layer of a stage, and the one after its last."""
REMOTE: Final = -1
"""Stands for the remote folder where others are disks."""


class DiskView(StrictModel):
    """What a disk has of one checkpoint."""

    metadata: str = ""
    """Text of its metadata.json; empty where there is none that is sound."""
    sound: tuple[FileName, ...] = ()
    """Files whose content is what was saved."""
    damage: str = ""
    """What is wrong with the first thing that is not sound; empty where the disk never had it."""

    @classmethod
    def of(cls, checkpoint: Path) -> "DiskView":
        """Look at a checkpoint and hash its files."""
        if not checkpoint.exists():
            return cls()
        sound: list[str] = []
        damage = ""
        try:
            metadata, noted = _noted(checkpoint)
        except CheckpointError as reason:
            return cls(damage=what_is_wrong(reason, checkpoint))
        for name in noted.sound:
            try:
                check_size(checkpoint / name, metadata.files[name])
                check_hash(checkpoint / name, metadata.files[name])
                sound.append(name)
            except (CheckpointError, OSError) as reason:
                damage = damage or what_is_wrong(reason, checkpoint)
        return noted.model_copy(update={"sound": tuple(sound), "damage": damage})

    @classmethod
    def by_names(cls, checkpoint: Path) -> "DiskView":
        """Look at a checkpoint and at none of its files; raise `CheckpointError` where its metadata cannot be read."""
        return _noted(checkpoint)[1]


def _noted(checkpoint: Path) -> tuple[Metadata, DiskView]:
    """Return the metadata of a checkpoint, and what is noted beside it as held."""
    metadata = read_metadata_alone(checkpoint)
    text = read_text(checkpoint / METADATA, CheckpointError)
    return metadata, DiskView(metadata=text, sound=tuple(held_files(checkpoint, metadata.files)))


class WholeCheckpoint(NamedTuple):
    """A checkpoint all of whose files are sound on some disk."""

    text: str
    """Of its metadata.json, the same on all disks that have a part of it."""
    metadata: Metadata
    holders: Mapping[str, Sequence[int]]
    """Disks that have each file."""

    def to_fetch(self, disk: int, needed: Sequence[str]) -> dict[str, int]:
        """Return which of the needed files a disk lacks, and which disk has them."""
        return {name: self.holders[name][0] for name in needed if disk not in self.holders[name]}

    def held_by(self, disk: int) -> list[str]:
        """Return the files that a disk has."""
        return [name for name, holders in self.holders.items() if disk in holders]


def whole_checkpoint(views: Mapping[int, DiskView]) -> WholeCheckpoint | str:
    """Return what the disks have together, or what is missing where that is not a whole checkpoint.

    Disks may have saved different states under one number, where some were away when the run went back: only files of
    one and the same metadata belong together, and of two whole ones that of more disks counts; the remote folder, which
    may be late, counts as the last of them.
    """
    versions: dict[str, list[int]] = defaultdict(list)
    for disk, view in views.items():
        if view.metadata:
            versions[view.metadata].append(disk)
    problems = []
    for text, disks in sorted(versions.items(), key=lambda entry: (-len(entry[1]), REMOTE in entry[1], entry[1])):
        metadata = parse(Metadata, parse_json(text, METADATA, CheckpointError), METADATA, CheckpointError)
        holders = {name: [disk for disk in disks if name in views[disk].sound] for name in metadata.files}
        missing = [name for name, found in holders.items() if not found]
        if not missing:
            return WholeCheckpoint(text, metadata, holders)
        problems.append(f"{missing[0]}: sound on none of the {len(views)} disks")
    problems += [view.damage for view in views.values() if view.damage]
    return problems[0] if problems else "no disk has its metadata.json"


def needed_files(metadata: Metadata, stages: Sequence[LayerRange]) -> list[str]:
    """Return the files with parameters or optimizer state of these stages; all where it does not say what they hold.

    The first stage's files have the embeddings and the head as well.
    """
    if metadata.layers is None:
        return sorted(metadata.files)
    saved = [
        index
        for index, (first, end) in enumerate(metadata.layers)
        if any((first < wanted_end and wanted < end) or index == wanted == 0 for wanted, wanted_end in stages)
    ]
    return sorted(name for name in metadata.files if int(name.split(".")[0].split("-")[2]) in saved)
