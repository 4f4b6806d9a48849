"""Checkpoints in a second place by URL: brought there whole, and fetched where the run directory has less."""

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
from training_runs import ALONE, losses, make_experiment, train_alone

from skippipe.checkpoint.disks.gathering import Gathering
from skippipe.checkpoint.disks.remote_folder import RemoteFolder, Uploads
from skippipe.checkpoint.disks.run_disks import ONE_DISK
from skippipe.checkpoint.reader import (
    METADATA,
    FileRecord,
    Metadata,
    checkpoint_path,
    checkpoints_folder,
    file_sha256,
    metadata_sha256,
    read_metadata,
    reference_to,
)
from skippipe.checkpoint.soundness import newest_sound_checkpoint
from skippipe.errors import CheckpointError, ConfigError, StorageError
from skippipe.monitor.metrics_file import read_metrics
from skippipe.training.records.collecting import collect_run

NAME = "model-stage-0.safetensors"


def saved(folder: Path, step: int, text: str) -> tuple[Path, dict[str, FileRecord]]:
    """Write a checkpoint of one file."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True, exist_ok=True)
    (path / NAME).write_text(text)
    files = {NAME: FileRecord(size_bytes=len(text), sha256=file_sha256(path / NAME))}
    facts = {"tokens": 0, "elapsed_s": 0.0, "seed": 1, "dtype": "float32", "model": {}, "data": {}, "plan_hash": ""}
    content = Metadata.model_validate(facts | {"step": step, "files": files}).model_dump(
        mode="json", exclude={"sha256"}
    )
    (path / METADATA).write_text(json.dumps(content | {"sha256": metadata_sha256(content)}))
    return path, files


def newest_only_there(remote: RemoteFolder, run: Path) -> Path:
    """Bring steps 2 and 3 of a run there, and remove the newer one here; return its path."""
    for step in (2, 3):
        path, files = saved(checkpoints_folder(run), step, "first")
        remote.bring(path, files)
        assert remote.complete(path, lambda: True)
    shutil.rmtree(path)
    return path


@pytest.fixture(params=["memory://place/run", "path"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> RemoteFolder:
    """Return an empty folder in memory, or on the disk."""
    if "memory" in request.param:
        fsspec.filesystem("memory").store.clear()
        return RemoteFolder(request.param)
    return RemoteFolder(str(tmp_path / "there"))


def test_a_checkpoint_counts_once_all_of_it_is_there(remote: RemoteFolder, tmp_path: Path) -> None:
    path, files = saved(tmp_path, 3, "first")
    assert (remote.steps(), remote.view(path).metadata) == ([], "")
    assert not remote.complete(path, lambda: False)
    remote.bring(path, files)
    assert remote.steps() == []
    assert remote.complete(path, lambda: True)
    assert remote.steps() == [3]
    assert remote.view(path).sound == (NAME,)
    (path / NAME).unlink()
    remote.fetch(path.name, NAME, files[NAME], path)
    assert (path / NAME).read_text() == "first"
    other = FileRecord(size_bytes=5, sha256="0" * 64)
    with pytest.raises(StorageError, match="remote_save_folder"):
        remote.fetch(path.name, NAME, other, path)
    assert [file.name for file in path.iterdir() if file.name.startswith(".")] == []


def test_files_of_another_state_of_a_step_are_never_taken_for_it(remote: RemoteFolder, tmp_path: Path) -> None:
    path, files = saved(tmp_path, 3, "first")
    remote.bring(path, files)
    assert remote.complete(path, lambda: True)
    path, newer = saved(tmp_path, 3, "again")
    assert not remote.complete(path, lambda: False)  # a file of the same size is there, of the state before
    assert remote.view(path).sound == (NAME,)
    remote.fetch(path.name, NAME, files[NAME], path)
    assert (path / NAME).read_text() == "first"
    saved(tmp_path, 3, "again")
    remote.bring(path, newer)
    assert remote.complete(path, lambda: True)
    assert newer[NAME].sha256 in remote.view(path).metadata


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    remote = RemoteFolder(str(tmp_path / "there"))
    path, files = saved(tmp_path, 3, "first")
    remote.bring(path, files)
    (stored,) = (tmp_path / "there").rglob(f"*{NAME}")
    stored.write_text("fIrst")
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        remote.fetch(path.name, NAME, files[NAME], path)
    assert (path / NAME).read_text() == "first"


def test_a_newer_state_here_counts_before_the_one_of_its_step_there(tmp_path: Path) -> None:
    remote, run = RemoteFolder(str(tmp_path / "there")), tmp_path / "run"
    path, files = saved(checkpoints_folder(run), 3, "first")
    remote.bring(path, files)
    assert remote.complete(path, lambda: True)
    saved(checkpoints_folder(run), 3, "again")  # the same step once more, and not brought there yet
    assert Gathering(ALONE, ONE_DISK, None, remote).newest(run, None) == (path, {})
    assert (path / NAME).read_text() == "again"


def test_an_older_one_counts_where_what_is_there_of_the_newest_is_damaged(tmp_path: Path) -> None:
    remote, run = RemoteFolder(str(tmp_path / "there")), tmp_path / "run"
    path = newest_only_there(remote, run)
    (stored,) = (tmp_path / "there" / path.name).rglob(f"*{NAME}")
    stored.write_text("fIrst")
    found, damaged = Gathering(ALONE, ONE_DISK, None, remote).newest(run, None)
    assert (found, [*damaged]) == (checkpoint_path(run, 2), [path])
    assert "SHA-256 differs" in damaged[path]
    assert [entry.name for entry in path.parent.iterdir()] == ["step-00000002"]


def test_a_fetch_that_was_interrupted_leaves_nothing_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, run = RemoteFolder(str(tmp_path / "there")), tmp_path / "run"
    newest_only_there(remote, run)

    def killed(*_: object) -> None:
        assert newest_sound_checkpoint(run) == (checkpoint_path(run, 2), {})
        raise KeyboardInterrupt

    monkeypatch.setattr(RemoteFolder, "fetch", killed)
    with pytest.raises(KeyboardInterrupt):
        Gathering(ALONE, ONE_DISK, None, remote).newest(run, None)
    assert newest_sound_checkpoint(run) == (checkpoint_path(run, 2), {})


def test_a_file_that_has_become_shorter_holds_up_no_later_checkpoint(tmp_path: Path) -> None:
    base, _ = saved(tmp_path / "run", 0, "weights")
    uploads = Uploads(str(tmp_path / "there"), keep_last=3)
    reference = reference_to(base)
    (base / NAME).write_text("short")
    for step, on_base in ((5, True), (6, False)):
        path, files = saved(tmp_path / "run", step, "text")
        metadata = read_metadata(path)
        based = metadata.model_copy(update={"base": reference}) if on_base else metadata
        uploads.begin(path, files, based, completes=True)
    uploads.close(20.0)
    assert RemoteFolder(str(tmp_path / "there")).steps() == [6]


def test_older_ones_go_but_for_what_others_stand_on(remote: RemoteFolder, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        path, files = saved(tmp_path, step, "text")
        remote.bring(path, files)
        if step not in (3, 5):  # 3 was given up, 5 is on its way
            assert remote.complete(path, lambda: True)
    remote.remove_old(1, ["step-00000001"])
    assert remote.steps() == [1, 4]
    assert remote.complete(path, lambda: True)
    assert remote.steps() == [1, 4, 5]


def test_a_place_that_cannot_be_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"remote_save_folder: nowhere://x: .*nowhere"):
        RemoteFolder("nowhere://x")
    (tmp_path / "file").write_text("")
    path, files = saved(tmp_path, 3, "first")
    with pytest.raises(StorageError, match=r"remote_save_folder: .*file/below: .*see to its address"):
        RemoteFolder(str(tmp_path / "file" / "below")).bring(path, files)


def test_a_run_goes_on_from_there_when_its_disk_is_gone(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    saving = {"remote_save_folder": "memory://runs/one", "interval": 1}
    experiment = make_experiment(tmp_path, training={"max_steps": 2}, evaluation={"interval": 0}, checkpoint=saving)
    train_alone(experiment)
    (_, expected) = losses(experiment.run_path)
    assert memory.exists("/runs/one/step-00000002")
    memory.rm("/runs/one/step-00000002", recursive=True)
    shutil.rmtree(experiment.run_path)
    assert train_alone(experiment).first_step == 1
    (again,) = read_metrics(experiment.run_path / "metrics.jsonl")
    assert again["train/loss"] == expected
    shutil.rmtree(experiment.run_path / "checkpoints")
    found = collect_run(experiment.run_path, ALONE)
    assert found == checkpoint_path(experiment.run_path, 2)
    assert what_is_missing(found) == []


def test_a_run_sent_back_is_never_taken_on_by_steps_that_lie_there(tmp_path: Path) -> None:
    there = tmp_path / "there"
    saving = {"remote_save_folder": str(there), "interval": 2}
    quiet: dict[str, Any] = {"evaluation": {"interval": 0}}
    experiment = make_experiment(tmp_path, checkpoint=saving, **quiet)
    train_alone(experiment)
    run = experiment.run_path
    shutil.rmtree(checkpoint_path(run, 6))  # as the refusal of what is local advises
    records = {name: (run / name).read_bytes() for name in ("config.yaml", "metrics.jsonl")}
    cases = [
        ("run", "step-00000004", "starts after step 4, but .*/there has step-00000006"),
        ("other", str(checkpoint_path(run, 4)), "starts after step 4, but .*/there has step-00000006"),
        ("third", "never", "starts after step 0, but .*/there has step-00000002, step-00000004, step-00000006"),
    ]
    for name, resume, message in cases:
        back = make_experiment(tmp_path, name, checkpoint=saving | {"resume": resume}, **quiet)
        with pytest.raises(ConfigError, match=rf"{message} already; choose another remote_save_folder"):
            train_alone(back)
        assert name == "run" or not (back.run_path / "config.yaml").exists()
    assert {name: (run / name).read_bytes() for name in records} == records
    shutil.rmtree(there / "step-00000006")
    back = make_experiment(
        tmp_path, training={"max_steps": 5}, checkpoint=saving | {"resume": "step-00000004"}, **quiet
    )
    assert train_alone(back).first_step == 4
    assert train_alone(experiment).first_step == 5


def test_a_start_passes_over_what_is_damaged_there(tmp_path: Path) -> None:
    there = tmp_path / "there"
    saving = {"remote_save_folder": str(there), "interval": 2}
    experiment = make_experiment(tmp_path, evaluation={"interval": 0}, checkpoint=saving)
    train_alone(experiment)
    shutil.rmtree(checkpoint_path(experiment.run_path, 6))
    for path in (there / "step-00000006").glob("*.safetensors"):
        path.write_bytes(b"short")
    assert train_alone(experiment).first_step == 4


def what_is_missing(checkpoint: Path) -> list[str]:
    """Return the files of a checkpoint that are not what was saved."""
    files = read_metadata(checkpoint).files
    return [name for name, record in files.items() if file_sha256(checkpoint / name) != record.sha256]
