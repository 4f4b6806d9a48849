"""Which checkpoint of a run to go on from: the newest sound one, with a line about each newer one that is damaged.

Sizes and hashes are checked before anything is loaded. Of many ranks each hashes a part of the files.
"""

import logging
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from skippipe.checkpoint.held_files import HELD, held_files
from skippipe.checkpoint.reader import (
    NO_DIRECTORY,
    TensorFileKind,
    check_hash,
    checkpoint_path,
    found_checkpoints,
    last_completed,
    note_last_completed,
    parts_of,
)
from skippipe.errors import CheckpointError, StorageError
from skippipe.runtime.ranks.agreement import all_gather_json, on_first_rank
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic

logger = logging.getLogger(__name__)

BOTH_KINDS: Final[tuple[TensorFileKind, ...]] = ("model", "optimizer")
HASHED_BYTES_PER_S = 20e6
"""Slower storage than this is taken for a rank that hangs, beyond the timeout of the run."""
DAMAGED = "damaged-"
"""Stands before the name of a checkpoint that was set aside."""
ALONE: Final = DistributedContext(rank=0, world_size=1, local_rank=0, timeout_s=0.0)


def newest_sound_checkpoint(
    run_dir: Path, context: DistributedContext = ALONE, kinds: tuple[TensorFileKind, ...] = BOTH_KINDS
) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest checkpoint whose files of `kinds` are what was saved, and what is wrong with each newer one.

    All ranks call this together and get the same. Without any checkpoint it is None; raises `CheckpointError` where
    there are some and none is sound.
    """
    steps = on_first_rank(context, Topic.CHECKPOINTS, lambda: saved_steps(run_dir))
    damaged: dict[Path, str] = {}
    for checkpoint in (checkpoint_path(run_dir, step) for step in reversed(steps)):
        damage = damage_on_any_rank(checkpoint, context, kinds)
        if damage is None:
            return checkpoint, damaged
        damaged[checkpoint] = damage
    if damaged:
        on_first_rank(context, Topic.DAMAGED_CHECKPOINTS, lambda: refuse(damaged))
    return None, damaged


def require_sound_checkpoint(run_dir: Path, context: DistributedContext = ALONE) -> Path:
    """Return the newest checkpoint whose weights are what was saved; all ranks call this together.

    Rank 0 says which newer ones are damaged. Raises `CheckpointError` where there is none.
    """
    checkpoint, damaged = newest_sound_checkpoint(run_dir, context, kinds=("model",))
    if checkpoint is None:
        raise CheckpointError(f"{run_dir}: there is no checkpoint; train it first")
    for path, damage in damaged.items():
        say = logger.warning if context.rank == 0 else logger.debug
        say("%s; reading %s", _in_words(path, damage), checkpoint.name)
    return checkpoint


def damage_on_any_rank(
    checkpoint: Path, context: DistributedContext, kinds: tuple[TensorFileKind, ...] = BOTH_KINDS
) -> str | None:
    """Return what is wrong with a checkpoint, None where nothing is; the same on all ranks, which share the hashing."""
    share = slice(context.rank, None, context.world_size)
    limit_s = context.timeout_s + size_bytes(checkpoint) / HASHED_BYTES_PER_S
    found = all_gather_json(context, Topic.CHECKPOINT_SOUND, lambda: _damage(checkpoint, kinds, share), limit_s=limit_s)
    return next((damage for damage in found if damage is not None), None)


def set_aside(damaged: Mapping[Path, str], instead: Path) -> None:
    """Rename damaged checkpoints, so that none counts as one of the run's or is overwritten; say so, a line each."""
    for path, damage in damaged.items():
        aside, said = path.with_name(DAMAGED + path.name), _in_words(path, damage)
        if not path.exists():
            logger.warning("%s; continuing from %s", said, instead.name)
            continue
        try:
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        except OSError as reason:
            raise StorageError(f"{said}, and cannot be renamed ({reason.strerror or reason}); move it away") from None
        logger.warning("%s; continuing from %s, the damaged one is kept as %s", said, instead.name, aside.name)
    note_last_completed(instead)


def refuse(damaged: Mapping[Path, str]) -> None:
    """Raise `CheckpointError` for a run none of whose checkpoints can be used."""
    newest, damage = next(iter(damaged.items()))
    among = f"none of the {len(damaged)} checkpoints can be read" if len(damaged) > 1 else "there is no other"
    raise CheckpointError(
        f"{_in_words(newest, damage)}; {among}. Nothing was changed: bring one back from a copy, or move "
        f"{newest.parents[1]} away to begin anew"
    )


def _in_words(checkpoint: Path, damage: str) -> str:
    gone = not checkpoint.exists() and damage.endswith(NO_DIRECTORY)
    return f"{checkpoint} was saved and is gone" if gone else f"{checkpoint} is damaged: {damage}"


def saved_steps(run_dir: Path) -> list[int]:
    """Return the steps of all checkpoints, oldest first, and of the one completed last also where it is gone."""
    last = last_completed(run_dir)
    paths = found_checkpoints(run_dir) + ([] if last is None else [last])
    return sorted({int(path.name.removeprefix("step-")) for path in paths})


def _damage(checkpoint: Path, kinds: Iterable[TensorFileKind], share: slice) -> str | None:
    """Return what is wrong with the metadata, a file's size, or the content of this rank's share of the files."""
    try:
        records = [
            (part / name, metadata.files[name])
            for part, metadata in parts_of(checkpoint)
            for name in held_files(part, metadata.files)
        ]
        if not any(path.parent == checkpoint for path, _ in records):
            raise CheckpointError(f"{checkpoint}/{HELD}: none of its files is on this disk")
        for path, record in sorted(records, key=lambda entry: entry[0])[share]:
            if path.name.startswith(tuple(kinds)):
                check_hash(path, record)
    except (CheckpointError, OSError) as reason:
        return what_is_wrong(reason, checkpoint)
    return None


def what_is_wrong(reason: Exception, checkpoint: Path) -> str:
    """Return what an error says of a checkpoint, without its place and the remedy."""
    return str(reason).removeprefix(f"{checkpoint}/").partition("; ")[0]


def size_bytes(checkpoint: Path) -> int:
    """Return the bytes of a checkpoint's files, as far as they can be seen from here."""
    folders = [checkpoint]
    with suppress(CheckpointError):
        folders = [part for part, _ in parts_of(checkpoint)]
    try:
        return sum(path.stat().st_size for folder in folders for path in folder.iterdir())
    except OSError:
        return 0
