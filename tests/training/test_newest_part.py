"""A stage's part of the newest checkpoint, from the disks that have it."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from skippipe.checkpoint.disks.disk_view import DiskView
from skippipe.checkpoint.disks.newest_part import (
    NEWEST,
    SavedFiles,
    bring_part,
    newest_part,
    newest_view,
    offer_newest,
    saved_stages,
)
from skippipe.checkpoint.disks.peer_files import PeerFiles
from skippipe.checkpoint.held_files import held_files, note_held_files
from skippipe.checkpoint.reader import METADATA, FileRecord, Metadata, checkpoint_path, file_sha256, metadata_sha256
from skippipe.errors import CheckpointError
from skippipe.membership.exchange import Exchange
from skippipe.membership.keys import run_keys

NAMES = ("model-stage-0.safetensors", "model-stage-1.safetensors")
LAYERS = ((0, 2), (2, 4))


def save(run_dir: Path, step: int, *names: str) -> Path:
    """Write what a disk has of a checkpoint of two files."""
    path = checkpoint_path(run_dir, step)
    path.mkdir(parents=True)
    for name in NAMES:
        (path / name).write_text(f"{name} {step}")
    files = {name: FileRecord(size_bytes=len(name) + 2, sha256=file_sha256(path / name)) for name in NAMES}
    facts = {"step": step, "tokens": 0, "elapsed_s": 0.0, "seed": 1, "dtype": "float32", "model": {}, "data": {}}
    metadata = Metadata.model_validate(facts | {"plan_hash": "", "layers": LAYERS, "files": files})
    content = metadata.model_dump(mode="json", exclude={"sha256"})
    (path / METADATA).write_text(json.dumps(content | {"sha256": metadata_sha256(content)}))
    note_held_files(path, names)
    for name in {*NAMES} - {*names}:
        (path / name).unlink()
    return path


@pytest.fixture
def exchanges() -> Iterator[list[Exchange]]:
    """Two exchanges of one run."""
    with ExitStack() as stack:
        yield [stack.enter_context(closing(Exchange(run_keys("0123456789abcdef")))) for _ in range(2)]


def test_a_part_that_another_disk_has_comes_to_this_one(tmp_path: Path, exchanges: list[Exchange]) -> None:
    theirs, own = tmp_path / "theirs", tmp_path / "own"
    saved = save(theirs, 8, NAMES[1])
    here = save(own, 8, NAMES[0])
    views = {0: offer_newest(exchanges[0], theirs), 1: newest_view(own)}
    part = newest_part({disk: view for disk, view in views.items() if view}, LAYERS[1])
    assert part is not None
    assert part.holders == {NAMES[1]: [0]}
    peers = PeerFiles(exchanges[1], tuple(("127.0.0.1", exchange.port) for exchange in exchanges), 10.0)
    bring_part(part, here, 1, views[1], peers, lambda: True)
    assert (here / NAMES[1]).read_bytes() == (saved / NAMES[1]).read_bytes()
    assert held_files(here, NAMES) == [*NAMES]

    (saved / NAMES[1]).unlink()
    (saved / NAMES[1]).write_text("x" * (len(NAMES[1]) + 2))
    offer_newest(exchanges[0], theirs)
    with pytest.raises(CheckpointError, match="another content than was saved"):
        bring_part(part, checkpoint_path(tmp_path / "third", 8), 2, None, peers, lambda: True)
    assert exchanges[1].fetch(peers.source(0), f"{NEWEST}/{NAMES[0]}", 10.0) is None


def test_the_newest_checkpoint_with_the_part_counts(tmp_path: Path) -> None:
    def view(disk: str, step: int, *names: str) -> DiskView:
        save(tmp_path / disk, step, *names)
        found = newest_view(tmp_path / disk)
        assert found is not None
        return found

    views = {0: view("a", 4, *NAMES), 1: view("b", 8, NAMES[0]), 2: view("c", 8, NAMES[0])}
    newer, older = newest_part(views, LAYERS[0]), newest_part(views, LAYERS[1])
    assert newer is not None
    assert older is not None
    assert (newer.metadata.step, newer.holders) == (8, {NAMES[0]: [1, 2]})
    assert (older.metadata.step, older.holders) == (4, {NAMES[1]: [0]})
    assert newest_part({1: views[1]}, LAYERS[1]) is None
    said = [found for each in views.values() if (found := SavedFiles.of(each))]
    layers = dict(enumerate(LAYERS))
    assert saved_stages(views[1], said, layers) == {0}
    assert saved_stages(views[0], said, layers) == {0, 1}
    assert saved_stages(newest_view(tmp_path), said, layers) == set()
    (checkpoint_path(tmp_path / "a", 4) / METADATA).write_text("{")
    assert newest_view(tmp_path / "a") is None
