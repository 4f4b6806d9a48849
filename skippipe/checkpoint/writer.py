"""Writing checkpoints: copied while training stands still, written aside by a thread, then renamed.

A checkpoint under its final name is complete. Where any rank fails (full disk, permissions) nothing is left behind
under that name and the checkpoints before stay. The threads use no collective: every rank reports through the store to
the first rank of each disk, which gives the name there. That is rank 0 alone where storage is shared. Where it is not,
every file lies on two disks before any of them gives the name, and older checkpoints go once all have given it.
"""

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from skippipe.checkpoint.disks.peer_files import PeerFiles
from skippipe.checkpoint.disks.remote_folder import Uploads
from skippipe.checkpoint.disks.run_disks import ONE_DISK, RunDisks
from skippipe.checkpoint.disks.second_copies import files_on_disk, files_to_fetch, second_writer
from skippipe.checkpoint.file_image import FileImage
from skippipe.checkpoint.held_files import note_held_files
from skippipe.checkpoint.reader import (
    METADATA,
    BaseCheckpoint,
    FileRecord,
    Metadata,
    checkpoint_path,
    checkpoints_folder,
    complete_checkpoints,
    metadata_sha256,
    note_last_completed,
    parts_of,
    reference_to,
)
from skippipe.checkpoint.report_board import FileReport, ReportBoard
from skippipe.config.experiment import CheckpointOptions
from skippipe.errors import CheckpointError, SkipPipeError, StorageError
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.runner import Runner
from skippipe_scheduler.files import write_atomically

logger = logging.getLogger(__name__)
_FORMER: Final = ".former"
"""What the name of a checkpoint ends in while another one takes its place."""


class OptimizerState(Protocol):
    """What a checkpoint needs of an optimizer (`skippipe.training.optimizer`)."""

    @property
    def sharded(self) -> bool:
        """Whether the other replicas hold other parts of the state."""

    def state(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        """Return the state of those of the parameters `names` that this rank saves, on the CPU."""


class StageParts(Protocol):
    """Parameters and optimizer state of a stage, by name."""

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters."""

    @property
    def optimizer(self) -> dict[str, Tensor]:
        """What the optimizer keeps of them."""


class KeptStages(Protocol):
    """Stages that no rank holds and of which this process has a copy."""

    @property
    def absent_states(self) -> Mapping[int, StageParts]:
        """The copies, by stage."""


class CheckpointWriter:
    """Saves what the runner and the optimizer hold. All ranks call `save` and `finish` together, between iterations.

    A failure is logged by the rank on which it happened, and by rank 0.
    """

    def __init__(
        self,
        run_dir: Path,
        runner: Runner,
        optimizer: OptimizerState,
        options: CheckpointOptions,
        store: Store | None = None,
        disks: RunDisks = ONE_DISK,
        peers: PeerFiles | None = None,
        kept: KeptStages | None = None,
        uploads: Uploads | None = None,
        may_write: Callable[[], bool] = lambda: True,
    ) -> None:
        """`peers` bring files from one disk to another; they are needed where there are several.

        `may_write` says whether this process is still in the run.
        """
        self._may_write = may_write
        self._uploads = uploads
        self._kept = kept
        self._disks, self._peers = disks, peers
        self._run_dir = run_dir
        self._runner = runner
        self._optimizer = optimizer
        self._options = options
        self._board = ReportBoard(store, runner.rank, disks.firsts)
        self._images: dict[str, FileImage] = {}
        seconds = (index for index in runner.stages if second_writer(runner.plans.main, index, disks) == runner.rank)
        self._seconds = {name for index in seconds for name in _file_names(index)}
        self._offered: dict[str, FileImage] = {}
        self._pending: Future[bool] | None = None
        self._pending_step = 0
        self._begun_s = 0.0
        self._complete = False
        self._abandoned = threading.Event()
        self.blocked_s: float | None = None
        """Seconds for which the last `save` kept training from going on; None before the first."""

    def save(self, metadata: Metadata) -> None:
        """Copy the present state and begin to write it; return when training may go on.

        One checkpoint is written at a time: where the one before is still being written, this waits for it first.
        `metadata.files` is filled in later. Without `checkpoint.asynchronous` the checkpoint is finished on return.
        """
        start_s = time.perf_counter()
        before = self._pending_step
        self.finish()
        waited_s = time.perf_counter() - start_s
        if waited_s > time_limits.NOTICEABLE_S and self._runner.rank == 0:
            logger.warning(
                "step %d: training waited %.1f s until the checkpoint of step %d was written; "
                "raise checkpoint.interval, or put run_dir on faster storage",
                metadata.step,
                waited_s,
                before,
            )
        failure = self._copy()
        self._pending = self._begin(metadata, failure)
        self._pending_step, self._begun_s = metadata.step, time.monotonic()
        if not self._options.asynchronous:
            self.finish()
            self._images.clear()
        self.blocked_s = time.perf_counter() - start_s

    def finish(self) -> bool:
        """Wait until the checkpoint begun last is written; say whether it is complete, the same on every rank.

        The ranks ask each other again and again, so that one with slow storage is not taken for a lost one. Raises
        `StorageError`, on every rank, where one has not written its part within `checkpoint.timeout_s`.
        """
        if self._pending is None:
            return self._complete
        word_s = self._begun_s + time_limits.STORAGE_WORD_S
        busy = 1.0
        while busy:
            done = _wait(self._pending, time_limits.CHECKPOINT_POLL_S)
            failed = done and not self._pending.result()
            late = not done and self._left_s() <= 0
            busy, failures, any_late, ranks = self._runner.sum_over_ranks(
                [float(not done), float(failed), float(late), float(not done) * self._runner.rank]
            )
            who = f"rank {ranks:.0f}" if busy == 1 else f"{busy:.0f} ranks"
            if any_late:
                raise StorageError(self._overdue(who))
            if busy and time.monotonic() > word_s and self._runner.rank == 0:
                word_s += time_limits.STORAGE_WORD_S
                waited_s = time.monotonic() - self._begun_s
                logger.warning("step %d: %s still writes, for %.0f s by now", self._pending_step, who, waited_s)
        self._pending = None
        self._complete = not failures
        return self._complete

    def save_alone(self, metadata: Metadata) -> bool:
        """Save the present state where the connections between ranks are closed; say whether this rank's part is there.

        On the first rank of a disk it is the whole checkpoint. All ranks call this, with the same step.
        """
        if self._pending is not None and not _wait(self._pending, self._left_s()):
            raise StorageError(self._overdue(f"rank {self._runner.rank}"))
        if self._pending_step != metadata.step:
            self._pending = self._begin(metadata, self._copy())
            self._pending_step, self._begun_s = metadata.step, time.monotonic()
            if not _wait(self._pending, self._left_s()):
                raise StorageError(self._overdue(f"rank {self._runner.rank}"))
        saved = self._complete if self._pending is None else self._pending.result()
        self._pending = None
        return saved

    @property
    def unconfirmed_step(self) -> int | None:
        """The step of a checkpoint that was begun and of which the ranks do not know whether it is complete."""
        return None if self._pending is None else self._pending_step

    def abandon(self) -> None:
        """Leave a checkpoint that is being written to its thread: its other parts may never come."""
        self._abandoned.set()

    def _left_s(self) -> float:
        return self._begun_s + self._options.timeout_s - time.monotonic()

    def _overdue(self, who: str) -> str:
        return (
            f"step {self._pending_step}: {who} could not write the checkpoint to {self._run_dir} within "
            f"{self._options.timeout_s:g} s; see to that storage and start again from the checkpoint before, or raise "
            "checkpoint.timeout_s"
        )

    def close(self) -> None:
        """End the thread. Where an error ended the run, what is being written gets a short time to become complete."""
        self._abandoned.set()
        if self._pending is not None:
            _wait(self._pending, max(0.0, self._left_s()))

    def _begin(self, metadata: Metadata, failure: str) -> Future[bool]:
        """Write in a thread that does not keep the process: storage may hang for ever."""
        written: Future[bool] = Future()

        def write() -> None:
            try:
                written.set_result(self._write(metadata, failure))
            except BaseException as error:
                written.set_exception(error)

        threading.Thread(target=write, name="checkpoint", daemon=True).start()
        return written

    def _copy(self) -> str:
        """Copy what this process answers for; return why that was impossible, or ""."""
        try:
            for name, tensors in self._files():
                if name not in self._images or not self._images[name].fits(tensors):
                    pinned = any(tensor.is_cuda for tensor in tensors.values())
                    self._images[name] = FileImage(tensors, pinned=pinned)
                self._images[name].fill(tensors)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except (SkipPipeError, RuntimeError) as reason:  # torch raises the latter where there is no memory left
            return str(reason)
        return ""

    def _files(self) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        """Yield name and tensors of the files that this process writes, for itself or as the second writer."""
        owned = self._runner.owned_parameters().keys()
        for index, stage in self._runner.stages.items():
            model, optimizer = _file_names(index)
            tensors = {name: parameter.detach() for name, parameter in stage.trained_parameters().items()}
            is_writer = tensors.keys() <= owned or model in self._seconds
            if is_writer:
                yield model, tensors
            if self._optimizer.sharded:
                yield optimizer.replace(".", f"-rank-{self._runner.rank}."), self._optimizer.state(tensors)
            elif is_writer:
                yield optimizer, self._optimizer.state(tensors)
        for index, state in () if self._kept is None else self._kept.absent_states.items():
            yield from zip(_file_names(index), (state.parameters, state.optimizer), strict=True)

    def _write(self, metadata: Metadata, failure: str) -> bool:
        """Write this rank's files, report them and, on the first rank of a disk, complete the checkpoint there.

        Runs in the thread.
        """
        final = checkpoint_path(self._run_dir, metadata.step)
        aside = aside_path(final)
        try:
            report = self._write_files(aside, failure)
            if self._runner.rank == 0:
                report = report.model_copy(update={"metadata": metadata})
            self._offer(metadata.step, report)
            self._board.post(metadata.step, report)
            failure = report.failure
            if self._disks.is_first:
                self._complete_disk(aside, final, metadata.step)
                self._remove_old()
        except (OSError, SkipPipeError, RuntimeError) as reason:  # the store raises the last one
            failure = str(reason)
            if self._disks.is_first and not self._abandoned.is_set() and self._may_write():
                shutil.rmtree(aside, ignore_errors=True)
        if failure:
            logger.warning(
                "step %d: no checkpoint could be saved (%s); training goes on, earlier checkpoints are kept",
                metadata.step,
                failure,
            )
        return not failure

    def _complete_disk(self, aside: Path, final: Path, step: int) -> None:
        """Give the checkpoint its name, here and on all other disks, once every file lies on two of them."""
        disks = self._disks
        reports = self._collect(step, range(len(disks.of_rank)))
        files = {name: record for report in reports for name, record in sorted(report.files.items())}
        metadata = reports[0].metadata
        assert metadata is not None
        metadata = metadata.model_copy(update={"files": files})
        if disks.shared:
            self._finish(aside, final, metadata)
        else:
            self._agree(step, "copied", lambda: self._fetch_second_copies(aside, step, reports))
            self._agree(step, "named", lambda: self._finish(aside, final, metadata))
        if self._uploads is not None:
            own = (report.files for rank, report in enumerate(reports) if disks.of_rank[rank] == disks.own)
            records = {name: record for files in own for name, record in files.items()}
            self._uploads.begin(final, records, metadata, completes=disks.own == disks.of_rank[0])

    def _fetch_second_copies(self, aside: Path, step: int, reports: Sequence[FileReport]) -> None:
        """Bring the files here that have to lie on this disk too."""
        assert self._peers is not None
        for name, writer in files_to_fetch(reports, self._disks, self._disks.own).items():
            wanted, check = (lambda: not self._abandoned.is_set()), (lambda _: self._check_in_run())
            self._peers.fetch_file(writer, _offered(step, name), aside / name, wanted, check)
        note_held_files(aside, files_on_disk(reports, self._disks, self._disks.own))

    def _finish(self, aside: Path, final: Path, metadata: Metadata) -> None:
        self._check_in_run()
        _finish(aside, final, metadata, self._check_in_run)

    def _check_in_run(self) -> None:
        """Raise where the others may have gone on without this process: what it would write might be theirs."""
        if not self._may_write():
            raise CheckpointError("this process stood still, and the others may have gone on without it")

    def _agree(self, step: int, part: str, action: Callable[[], None]) -> None:
        """Do something on each disk; raise on all where it fails on any."""
        failure = ""
        try:
            action()
        except (OSError, SkipPipeError) as reason:
            failure = str(reason)
        self._board.post(step, FileReport(files={}, failure=failure), part)
        self._collect(step, self._disks.firsts, part)

    def _collect(self, step: int, ranks: Iterable[int], part: str = "files") -> list[FileReport]:
        return self._board.collect(step, self._abandoned, time_limits.CHECKPOINT_GRACE_S, ranks, part)

    def _offer(self, step: int, report: FileReport) -> None:
        """Have this rank's files ready for other disks, from memory, until the next checkpoint takes its place."""
        if self._peers is None:
            return
        self._peers.withdraw(self._offered)
        self._offered = {_offered(step, name): self._images[name] for name in report.files}
        for offered, image in self._offered.items():
            self._peers.offer(offered, image.view)

    def _write_files(self, aside: Path, failure: str) -> FileReport:
        if failure:
            return FileReport(files={}, failure=failure)
        records = {}
        try:
            self._check_in_run()
            aside.mkdir(parents=True, exist_ok=True)
            for name, image in self._images.items():
                self._check_in_run()
                records[name] = image.write(aside / name)
        except (OSError, CheckpointError) as reason:
            return FileReport(files={}, failure=str(reason))
        second = {name: record for name, record in records.items() if name in self._seconds}
        return FileReport(files={name: records[name] for name in records.keys() - second.keys()}, second=second)

    def _remove_old(self) -> None:
        self._check_in_run()
        found = complete_checkpoints(self._run_dir)
        bases = {part for path in found[-self._options.keep_last :] for part, _ in parts_of(path)}
        for path in found[: -self._options.keep_last]:
            if path in bases:
                continue
            # Renamed first, so that a crash in the middle leaves no half checkpoint under a final name.
            aside = aside_path(path)
            try:
                path.rename(aside)
            except OSError as reason:
                logger.warning("%s: the old checkpoint cannot be removed (%s)", path, reason)
            shutil.rmtree(aside, ignore_errors=True)


def write_stages(run_dir: Path, metadata: Metadata, stages: Sequence[Mapping[str, Tensor]]) -> None:
    """Write a checkpoint of parameters alone, from one process: what a run begins at. `metadata.files` is filled in."""
    final = checkpoint_path(run_dir, metadata.step)
    aside = aside_path(final)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    files: dict[str, FileRecord] = {}
    for index, tensors in enumerate(stages):
        image = FileImage(tensors)
        image.fill(tensors)
        name, _ = _file_names(index)
        files[name] = image.write(aside / name)
    _finish(aside, final, metadata.model_copy(update={"files": files}))


def kept_base(checkpoint: Path, run_dir: Path) -> BaseCheckpoint:
    """Return the checkpoint with the weights that are not trained, in the run's own folder: copied there if need be."""
    source = parts_of(checkpoint)[-1][0]
    own = checkpoints_folder(run_dir) / source.name
    if own.resolve() != source.resolve():
        aside = aside_path(own)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(source, aside)
        _put_in_place(aside, own)  # one that is there is of a run that was given up for this one
    return reference_to(own)


def aside_path(final: Path) -> Path:
    """Return where a checkpoint lies while it is not complete."""
    return final.with_name(f".{final.name}.tmp")


def _former_path(final: Path) -> Path:
    """Return where the checkpoint that had this name lies while another one takes its place."""
    return final.with_name(f".{final.name}{_FORMER}")


def restore_replaced(run_dir: Path) -> None:
    """Give a checkpoint its name again where its replacement was interrupted before that one had the name."""
    for former in checkpoints_folder(run_dir).glob(f".step-*{_FORMER}"):
        final = former.with_name(former.name.removeprefix(".").removesuffix(_FORMER))
        if final.exists():
            shutil.rmtree(former, ignore_errors=True)
        else:
            former.rename(final)


def remove_unfinished(run_dir: Path) -> None:
    """Remove what an interrupted save left behind."""
    for path in checkpoints_folder(run_dir).glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _file_names(stage: int) -> tuple[str, str]:
    """Return the names of a stage's files: of its parameters, and of its optimizer state."""
    return f"model-stage-{stage}.safetensors", f"optimizer-stage-{stage}.safetensors"


def _offered(step: int, name: str) -> str:
    """Return under what name other disks find a file of a checkpoint."""
    return f"checkpoint/{step}/{name}"


def _wait(pending: Future[bool], limit_s: float) -> bool:
    """Wait for so long at most; say whether it is done."""
    try:
        pending.exception(limit_s)
    except TimeoutError:
        return False
    return True


def _finish(aside: Path, final: Path, metadata: Metadata, check: Callable[[], None] = lambda: None) -> None:
    """Write the metadata, give the checkpoint its name; `check` raises where it may not have it any more."""
    content = metadata.model_dump(mode="json", exclude={"sha256"})
    content["sha256"] = metadata_sha256(content)
    write_atomically(aside / METADATA, json.dumps(content, indent=1) + "\n", check=check)
    _flush(aside)
    check()
    _put_in_place(aside, final)  # one that is there is of a start that ended after this very step
    note_last_completed(final)


def _put_in_place(aside: Path, final: Path) -> None:
    """Give a complete checkpoint its name; one that has that name is kept until then."""
    former = _former_path(final)
    shutil.rmtree(former, ignore_errors=True)
    if final.exists():
        final.rename(former)
    aside.rename(final)
    _flush(final.parent)
    shutil.rmtree(former, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
