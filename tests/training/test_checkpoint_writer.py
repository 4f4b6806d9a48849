"""Checkpoints written while training goes on: what they hold, who waits for whom, and what a failure leaves."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from training_runs import ALONE, make_experiment, small_plan, train_alone

from skippipe.checkpoint import writer as checkpoint_writer
from skippipe.checkpoint.file_image import FileImage
from skippipe.checkpoint.model_tensors import load_parameters
from skippipe.checkpoint.reader import (
    FileRecord,
    Metadata,
    checkpoint_path,
    complete_checkpoints,
    file_sha256,
    model_identity,
    read_metadata,
)
from skippipe.checkpoint.report_board import FileReport, ReportBoard
from skippipe.checkpoint.soundness import newest_sound_checkpoint
from skippipe.checkpoint.writer import (
    CheckpointWriter,
    aside_path,
    remove_unfinished,
    restore_replaced,
    write_stages,
)
from skippipe.config.experiment import CheckpointOptions
from skippipe.errors import CheckpointError, StorageError
from skippipe.model.architecture import experiment_model
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.store_names import Board, store_of_board
from skippipe.runtime.runner import Runner
from skippipe.runtime.runner_factory import make_runner
from skippipe.training.optimizer import AdamW

RECORD = FileRecord(size_bytes=1, sha256="ab")


class Gate:
    """Holds the writing thread before a checkpoint gets its name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        finish = checkpoint_writer._finish

        def finish_when_open(aside: Path, final: Path, metadata: Metadata, check: Callable[[], None]) -> None:
            self.reached.set()
            assert self.open.wait(30)
            finish(aside, final, metadata, check)

        monkeypatch.setattr(checkpoint_writer, "_finish", finish_when_open)


class Saving:
    """A writer, and the small model that it saves."""

    def __init__(self, folder: Path, timeout_s: float = 60.0) -> None:
        experiment = make_experiment(folder)
        self.config = experiment_model(experiment)
        self.run_dir = folder / "run"
        self.runner: Runner = make_runner(experiment, small_plan(), self.config, ALONE)
        optimizer = AdamW(self.runner.parameters(), experiment.optimizer, experiment.lr_scheduler, 6)
        self.answers: list[bool] = []
        """Whether this process is still in the run, each time that is asked; it is where nothing is left."""
        options = CheckpointOptions(timeout_s=timeout_s)
        self.writer = CheckpointWriter(self.run_dir, self.runner, optimizer, options, may_write=self.may_write)

    def may_write(self) -> bool:
        return self.answers.pop(0) if self.answers else True

    def save(self, step: int) -> None:
        self.writer.save(
            Metadata(
                step=step,
                tokens=0,
                elapsed_s=0,
                seed=3,
                dtype="float32",
                model=model_identity(self.config),
                data={},
                plan_hash="",
                files={},
            )
        )

    def values(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.runner.parameters().items()}

    def change(self) -> None:
        with torch.no_grad():
            for parameter in self.runner.parameters().values():
                parameter.add_(1.0)

    def complete(self) -> list[str]:
        return [path.name for path in complete_checkpoints(self.run_dir)]


@pytest.fixture
def saving(tmp_path: Path) -> Saving:
    return Saving(tmp_path)


@pytest.mark.parametrize("killed_before", ["the new one", "the old one goes"])
def test_a_step_saved_again_is_there_at_every_moment(
    saving: Saving, monkeypatch: pytest.MonkeyPatch, killed_before: str
) -> None:
    saving.save(1)
    assert saving.writer.finish()
    final = checkpoint_path(saving.run_dir, 1)
    rename, remove = Path.rename, shutil.rmtree

    def killed_rename(path: Path, target: Path) -> Path:
        if killed_before == "the new one" and target == final:
            raise KeyboardInterrupt
        return rename(path, target)

    def killed_remove(path: Path, ignore_errors: bool = False) -> None:
        if killed_before == "the old one goes" and path.exists() and path.name.endswith(".former"):
            raise KeyboardInterrupt
        remove(path, ignore_errors=ignore_errors)

    with monkeypatch.context() as killing:
        killing.setattr(Path, "rename", killed_rename)
        killing.setattr(shutil, "rmtree", killed_remove)
        with pytest.raises(KeyboardInterrupt):
            write_stages(saving.run_dir, read_metadata(final), [{"weight": torch.ones(2)}])
    restore_replaced(saving.run_dir)
    remove_unfinished(saving.run_dir)
    assert newest_sound_checkpoint(saving.run_dir) == (final, {})
    assert [path.name for path in final.parent.iterdir()] == [final.name]


@pytest.mark.parametrize("asked_before", range(5))
def test_one_that_may_be_out_of_the_run_names_and_removes_nothing(saving: Saving, asked_before: int) -> None:
    others = aside_path(checkpoint_path(saving.run_dir, 1)) / "of-others"
    others.parent.mkdir(parents=True)
    others.touch()
    saving.answers = [True] * asked_before + [False] * 100
    saving.save(1)
    assert not saving.writer.finish()
    assert saving.complete() == []
    assert others.exists()
    assert len(saving.answers) < 100  # it was asked


def test_training_goes_on_and_the_checkpoint_has_the_values_of_its_step(
    saving: Saving, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    expected = saving.values()
    saving.save(1)
    assert saving.complete() == []  # `save` has returned and nothing is complete
    saving.change()
    assert gate.reached.wait(30)
    saving.change()
    gate.open.set()
    assert saving.writer.finish()
    assert saving.complete() == ["step-00000001"]
    load_parameters(complete_checkpoints(saving.run_dir)[0], saving.config, saving.runner.stages.values())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saving.values().items())
    saving.writer.close()


def test_next_save_waits_for_the_one_before_and_says_so(
    saving: Saving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(time_limits, "NOTICEABLE_S", 0.0)
    gate = Gate(monkeypatch)
    saving.save(1)
    assert gate.reached.wait(30)
    opener = threading.Timer(0.3, gate.open.set)
    opener.start()
    saving.save(2)
    assert saving.writer.blocked_s is not None
    assert saving.writer.blocked_s > 0.1
    assert "until the checkpoint of step 1 was written; raise checkpoint.interval" in caplog.text
    assert saving.complete()[0] == "step-00000001"
    assert saving.writer.finish()
    assert saving.complete() == ["step-00000001", "step-00000002"]
    saving.writer.close()


def test_storage_that_hangs_is_said_and_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(time_limits, "STORAGE_WORD_S", 0.2)
    monkeypatch.setattr(time_limits, "CHECKPOINT_POLL_S", 0.05)
    gate, saving = Gate(monkeypatch), Saving(tmp_path, timeout_s=0.5)
    saving.save(1)
    with pytest.raises(StorageError, match=r"step 1: rank 0 could not write the checkpoint to .*run within 0.5 s; see"):
        saving.writer.finish()
    saving.writer.close()  # waits no more
    gate.open.set()
    assert "step 1: rank 0 still writes, for 0 s by now" in caplog.text


def test_closing_completes_what_is_being_written(saving: Saving) -> None:
    saving.save(1)
    saving.writer.close()
    assert saving.complete() == ["step-00000001"]


def test_folder_that_cannot_be_written_is_logged_and_the_next_save_succeeds(
    saving: Saving, caplog: pytest.LogCaptureFixture
) -> None:
    saving.run_dir.mkdir()
    blocking = saving.run_dir / "checkpoints"
    blocking.write_text("a file where the folder should be")
    saving.save(1)
    assert not saving.writer.finish()
    assert "step 1: no checkpoint could be saved (rank 0: [Errno" in caplog.text
    blocking.unlink()
    saving.save(2)
    assert saving.writer.finish()
    assert saving.complete() == ["step-00000002"]
    saving.writer.close()


def test_run_without_asynchronous_writing_saves_the_same_files(tmp_path: Path) -> None:
    for name, asynchronous in (("behind", True), ("at-once", False)):
        checkpoint = {"interval": 2, "asynchronous": asynchronous}
        train_alone(make_experiment(tmp_path, name, training={"max_steps": 2}, checkpoint=checkpoint))
    one, other = (complete_checkpoints(tmp_path / name)[-1] for name in ("behind", "at-once"))
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert len(names) == 6
    assert names == sorted(path.name for path in other.glob("*.safetensors"))
    assert [(one / name).read_bytes() for name in names] == [(other / name).read_bytes() for name in names]


def test_image_is_a_safetensors_file_and_its_record_is_true(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 5).bfloat16(),
        "flags": torch.tensor([True, False, True]),
        "step": torch.tensor(7.0),
        "wide": torch.randn(4, 2, dtype=torch.float64).t(),  # not contiguous
        "none": torch.empty(0, 3),
    }
    image = FileImage(tensors)
    for factor in (1, 2):
        now = {name: tensor if name == "flags" else tensor * factor for name, tensor in tensors.items()}
        assert image.fits(now)
        image.fill(now)
        record = image.write(tmp_path / "image.safetensors")
        loaded = load_file(tmp_path / "image.safetensors")
        assert loaded.keys() == now.keys()
        assert all(
            torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in now.items()
        )
        assert record == FileRecord(size_bytes=image.size_bytes, sha256=file_sha256(tmp_path / "image.safetensors"))
    assert not image.fits(tensors | {"step": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"signal: tensors of torch\.complex64 cannot be stored"):
        FileImage({"signal": torch.zeros(2, dtype=torch.complex64)})


def two_boards() -> list[ReportBoard]:
    store = HashStore()
    return [ReportBoard(store, rank) for rank in (0, 1)]


def test_records_of_all_ranks_come_together() -> None:
    boards = two_boards()
    for step in (1, 2):
        boards[0].post(step, FileReport(files={"model-stage-0.safetensors": RECORD}))
        later = threading.Timer(0.1, boards[1].post, (step, FileReport(files={"model-stage-1.safetensors": RECORD})))
        later.start()
        reports = boards[0].collect(step, threading.Event(), 1.0, range(2))
        assert [list(report.files) for report in reports] == [
            ["model-stage-0.safetensors"],
            ["model-stage-1.safetensors"],
        ]


def test_failure_of_another_rank_is_named() -> None:
    boards = two_boards()
    boards[0].post(1, FileReport(files={"model-stage-0.safetensors": RECORD}))
    boards[1].post(1, FileReport(files={}, failure="no space left"))
    with pytest.raises(CheckpointError, match=r"^rank 1: no space left$"):
        boards[0].collect(1, threading.Event(), 1.0, range(2))


def test_rank_that_never_reports_does_not_hold_the_end_of_the_run() -> None:
    boards = two_boards()
    boards[0].post(1, FileReport(files={}))
    ended = threading.Event()
    ended.set()
    with pytest.raises(CheckpointError, match="rank 1 did not finish its part before the run ended"):
        boards[0].collect(1, ended, 0.05, range(2))


@pytest.mark.parametrize("text", ["", "{", '{"files": {}}x', '{"files": {"../x": {}}}', "[]", '{"files": 9e999}'])
def test_report_that_is_none_fails_the_checkpoint_and_names_the_rank(text: str) -> None:
    store = HashStore()
    board = ReportBoard(store, 0)
    board.post(1, FileReport(files={}))
    store_of_board(store, Board.CHECKPOINT).set("1/files/1", text)
    with pytest.raises(CheckpointError, match="what rank 1 reports of step 1: "):
        board.collect(1, threading.Event(), 1.0, range(2))
