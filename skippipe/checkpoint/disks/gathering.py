"""The newest checkpoint that all disks together have whole, brought to where its parts are needed."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from skippipe.checkpoint.disks.disk_view import (
    REMOTE,
    DiskView,
    LayerRange,
    WholeCheckpoint,
    needed_files,
    whole_checkpoint,
)
from skippipe.checkpoint.disks.peer_files import PeerFiles, mapped
from skippipe.checkpoint.disks.remote_folder import RemoteFolder
from skippipe.checkpoint.disks.run_disks import RunDisks, cannot_be_written
from skippipe.checkpoint.held_files import note_held_files
from skippipe.checkpoint.reader import METADATA, FileRecord, Metadata, checkpoint_path
from skippipe.checkpoint.soundness import DAMAGED, HASHED_BYTES_PER_S, refuse, saved_steps, size_bytes, what_is_wrong
from skippipe.errors import CheckpointError
from skippipe.runtime.ranks.agreement import all_gather_json, on_first_rank
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic
from skippipe_scheduler.files import parse, replace_file

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
SLOWEST_BYTES_PER_S = 125_000
"""Links of less than 1 Mbit/s are taken for ones that hang, beyond the timeout of the run."""


class Gathering:
    """Finds and fetches checkpoints over all disks of a run; every call is made by all ranks together."""

    def __init__(
        self, context: DistributedContext, disks: RunDisks, peers: PeerFiles | None, remote: RemoteFolder | None = None
    ) -> None:
        """`peers` are needed where there are several disks; `remote` is one more place, which rank 0 looks into."""
        self._context, self._disks, self._peers, self._remote = context, disks, peers, remote

    def newest(self, run_dir: Path, stages: Sequence[LayerRange] | None) -> tuple[Path | None, dict[Path, str]]:
        """Bring the newest whole checkpoint here, as far as this process needs it, and say what is wrong with others.

        `stages` are the layers of this process's stages; None stands for all layers. Without any checkpoint on any
        disk it is None; raises `CheckpointError` where there are some and none is whole.
        """
        found = all_gather_json(self._context, Topic.CHECKPOINTS, lambda: self._if_first(lambda: self._steps(run_dir)))
        steps = sorted({step for disk in self._disks.firsts for step in found[disk]})
        damaged: dict[Path, str] = {}
        for checkpoint in (checkpoint_path(run_dir, step) for step in reversed(steps)):
            problem = self.bring(checkpoint, stages)
            if problem is None:
                return checkpoint, damaged
            damaged[checkpoint] = problem
        if damaged:
            on_first_rank(self._context, Topic.DAMAGED_CHECKPOINTS, lambda: refuse(damaged))
        return None, damaged

    def bring(self, checkpoint: Path, stages: Sequence[LayerRange] | None) -> str | None:
        """Bring a checkpoint here, as `newest` does; return what is wrong where the disks do not have it whole, or what
        came is not what was saved.
        """
        offered: list[str] = []
        try:
            views, ranges = self._look(checkpoint, stages, offered)
            whole = whole_checkpoint(views)
            if isinstance(whole, str):
                return whole
            needed = sorted(whole.metadata.files) if ranges is None else needed_files(whole.metadata, ranges)
            total_bytes = sum(record.size_bytes for record in whole.metadata.files.values())
            problems = all_gather_json(
                self._context,
                Topic.DISK_FETCHED,
                lambda: self._if_first(lambda: self._complete(checkpoint, whole, needed)),
                limit_s=self._context.timeout_s + total_bytes / SLOWEST_BYTES_PER_S,
            )
        finally:
            if self._peers is not None:
                self._peers.withdraw(offered)
        problem = next((found for found in problems if found is not None), None)
        base = whole.metadata.base
        if problem is not None:
            return str(problem)
        return None if base is None else self.bring(checkpoint.with_name(base.name), stages)

    def _look(
        self, checkpoint: Path, stages: Sequence[LayerRange] | None, offered: list[str]
    ) -> tuple[dict[int, DiskView], list[LayerRange] | None]:
        """Return what each disk has, and which layers the ranks of this process's disk need, None for all.

        What this disk has is offered before others hear of it; `offered` gets the names.
        """
        limit_s = self._context.timeout_s + size_bytes(checkpoint) / HASHED_BYTES_PER_S

        def own() -> dict[str, object]:
            remote = None
            if self._remote is not None and self._context.rank == 0:
                remote = self._remote.view(checkpoint).model_dump(mode="json")
            view = self._if_first(lambda: self._own_view(checkpoint, offered))
            return {"view": view, "remote": remote, "stages": stages}

        told = all_gather_json(self._context, Topic.DISK_CHECKPOINTS, own, limit_s=limit_s)
        views = {
            disk: parse(DiskView, told[disk]["view"], f"what rank {disk} sees", CheckpointError)
            for disk in self._disks.firsts
        }
        if self._remote is not None:
            views[REMOTE] = parse(DiskView, told[0]["remote"], "what rank 0 sees elsewhere", CheckpointError)
        wanted = [told[rank]["stages"] for rank, disk in enumerate(self._disks.of_rank) if disk == self._disks.own]
        if any(each is None for each in wanted):
            return views, None
        return views, [(int(first), int(end)) for each in wanted for first, end in each]

    def _own_view(self, checkpoint: Path, offered: list[str]) -> dict[str, object]:
        view = DiskView.of(checkpoint)
        if self._peers is not None:
            for name in view.sound:
                offered.append(_offered(checkpoint, name))
                self._peers.offer(offered[-1], partial(mapped, checkpoint / name))
        return view.model_dump(mode="json")

    def _complete(self, checkpoint: Path, whole: WholeCheckpoint, needed: Sequence[str]) -> str | None:
        """Fetch what this disk lacks of the files that it needs; return what is wrong with what came."""
        own = self._disks.own
        held, missing = whole.held_by(own), whole.to_fetch(own, needed)
        fetch = {name: partial(self._fetch, disk, checkpoint, name, whole.metadata) for name, disk in missing.items()}
        try:
            add_files(checkpoint, whole.text, held, fetch)
        except CheckpointError as reason:
            return what_is_wrong(reason, checkpoint)
        return None

    def _fetch(self, disk: int, checkpoint: Path, name: str, metadata: Metadata, folder: Path) -> None:
        """Bring one file of a disk's checkpoint into a folder here."""
        record = metadata.files[name]
        if disk == REMOTE:
            assert self._remote is not None
            self._remote.fetch(checkpoint.name, name, record, folder)
            return
        assert self._peers is not None
        check = partial(check_content, checkpoint / name, record)
        self._peers.fetch_file(disk, _offered(checkpoint, name), folder / name, check=check)

    def _steps(self, run_dir: Path) -> list[int]:
        elsewhere = self._remote.steps() if self._remote is not None and self._context.rank == 0 else []
        try:
            return sorted({*saved_steps(run_dir), *elsewhere})
        except CheckpointError:  # all that this directory had are gone
            if not elsewhere:
                raise
            return elsewhere

    def _if_first(self, action: Callable[[], Result]) -> Result | None:
        """Do something once on each disk."""
        return action() if self._disks.is_first else None


def add_files(checkpoint: Path, text: str, held: Sequence[str], fetch: Mapping[str, Callable[[Path], None]]) -> None:
    """Bring more files of a checkpoint to this disk, which has those that are `held`.

    Where none is, the checkpoint has its name only once all are here: without files it would count as the newest.

    Args:
        checkpoint: Where it lies, or is to lie.
        text: That of its metadata.json.
        held: Its files that are here and sound.
        fetch: What brings each other file into a folder here.

    Raises:
        StorageError: The run directory cannot be written.
    """
    folder = checkpoint if held else checkpoint.with_name(f".{checkpoint.name}.fetched.tmp")
    try:
        if not held:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        note_held_files(folder, held)  # a damaged file counts no more
        replace_file(folder / METADATA, text.encode())
        for bring in fetch.values():
            bring(folder)
        note_held_files(folder, [*held, *fetch])
        if not held:
            if checkpoint.exists():  # another state of the same number, or nothing sound
                aside = checkpoint.with_name(DAMAGED + checkpoint.name)
                shutil.rmtree(aside, ignore_errors=True)
                checkpoint.rename(aside)
            folder.rename(checkpoint)
    except OSError as reason:
        raise cannot_be_written(checkpoint, reason) from None
    finally:
        if not held:
            shutil.rmtree(folder, ignore_errors=True)
    if fetch:
        logger.info("%s: %d files fetched from elsewhere", checkpoint, len(fetch))


def check_content(path: Path, record: FileRecord, sha256: str) -> None:
    """Raise `CheckpointError` where a file that was fetched is not what was saved."""
    if sha256 != record.sha256:
        raise CheckpointError(f"{path}: arrived with another content than was saved")


def _offered(checkpoint: Path, name: str) -> str:
    return f"saved/{checkpoint.name}/{name}"
