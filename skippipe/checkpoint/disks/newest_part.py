"""A stage's part of the newest checkpoint of a run under way, from whichever disks have it."""

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from skippipe.checkpoint.disks.disk_view import DiskView, LayerRange, needed_files
from skippipe.checkpoint.disks.gathering import add_files, check_content
from skippipe.checkpoint.disks.peer_files import PeerFiles, mapped
from skippipe.checkpoint.held_files import FileName
from skippipe.checkpoint.reader import METADATA, Metadata, latest_checkpoint
from skippipe.errors import CheckpointError
from skippipe_scheduler.files import StrictModel, parse, parse_json

if TYPE_CHECKING:
    from skippipe.membership.exchange import Exchange

logger = logging.getLogger(__name__)
NEWEST: Final = "newest-checkpoint"
"""Under which name a member has what its disk has of the newest checkpoint; NEWEST/<name> are the files."""


class SavedFiles(StrictModel):
    """Which files of which checkpoint a disk has, in few words."""

    metadata_sha256: str
    """Of the text of its metadata.json."""
    files: tuple[FileName, ...]

    @classmethod
    def of(cls, view: DiskView | None) -> "SavedFiles | None":
        """Return it in few words."""
        return None if view is None else cls(metadata_sha256=_sha256(view.metadata), files=view.sound)


class NewestPart(NamedTuple):
    """What one stage needs of a checkpoint, and which disks have it."""

    text: str
    """Of its metadata.json."""
    metadata: Metadata
    holders: Mapping[str, Sequence[int]]
    """The disks that have each file that is needed."""


def newest_view(run_dir: Path) -> DiskView | None:
    """Return what this disk has of the newest checkpoint here, by the names of files; None where none can be read."""
    newest = _newest(run_dir)
    return None if newest is None else newest[1]


def offer_newest(exchange: "Exchange", run_dir: Path) -> DiskView | None:
    """Have what this disk has of the newest checkpoint ready for other members, each file once it is asked for."""
    newest = _newest(run_dir)
    if newest is None:
        return None
    checkpoint, view = newest
    exchange.offer(NEWEST, view.model_dump_json().encode())
    for name in view.sound:
        exchange.offer_made(f"{NEWEST}/{name}", partial(mapped, checkpoint / name))
    return view


def _newest(run_dir: Path) -> tuple[Path, DiskView] | None:
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None:
        return None
    try:
        return checkpoint, DiskView.by_names(checkpoint)
    except CheckpointError as reason:
        logger.warning("%s", reason)
        return None


def newest_part(views: Mapping[int, DiskView], layers: LayerRange) -> NewestPart | None:
    """Return the newest checkpoint of which some disks together have what a stage of these layers needs, or None."""
    versions: dict[str, list[int]] = defaultdict(list)
    for disk, view in views.items():
        versions[view.metadata].append(disk)
    found = []
    for text, disks in versions.items():
        metadata = parse(Metadata, parse_json(text, METADATA, CheckpointError), METADATA, CheckpointError)
        names = needed_files(metadata, [layers])
        holders = {name: [disk for disk in disks if name in views[disk].sound] for name in names}
        if all(holders.values()):
            found.append(NewestPart(text, metadata, holders))
    return max(found, key=lambda part: part.metadata.step, default=None)


def bring_part(
    part: NewestPart, checkpoint: Path, own: int, view: DiskView | None, peers: PeerFiles, wanted: Callable[[], bool]
) -> None:
    """Bring to this disk, `own`, what is not on it of a stage's part.

    Raises `CommunicationError` where another disk does not give it, or it is not `wanted` any more.
    """
    missing = {name: disks[0] for name, disks in part.holders.items() if own not in disks}
    if not missing:
        return
    held = view.sound if view is not None and view.metadata == part.text else ()

    def bring(name: str, disk: int, folder: Path) -> None:
        check = partial(check_content, checkpoint / name, part.metadata.files[name])
        peers.fetch_file(disk, f"{NEWEST}/{name}", folder / name, wanted, check)

    add_files(checkpoint, part.text, held, {name: partial(bring, name, disk) for name, disk in missing.items()})


def saved_stages(
    own: DiskView | None, said: Collection[SavedFiles], layers: Mapping[int, LayerRange]
) -> frozenset[int]:
    """Return the stages whose part of this disk's newest checkpoint the disks have that have `said` what they have."""
    if own is None:
        return frozenset()
    sha256 = _sha256(own.metadata)
    metadata = parse(Metadata, json.loads(own.metadata), METADATA, CheckpointError)
    there = {name for each in said if each.metadata_sha256 == sha256 for name in each.files}
    return frozenset(stage for stage, held in layers.items() if there.issuperset(needed_files(metadata, [held])))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
