"""Writing checkpoints: aside, to the disk, then renamed, with all ranks agreeing at every step.

A checkpoint under its final name is complete. Where any rank fails (full disk, permissions) nothing is left behind,
the checkpoints before stay, and `save` says so on every rank.
"""

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from skippipe.errors import CheckpointError, SkipPipeError
from skippipe.runtime.runner import Runner
from skippipe.training.checkpoint import (
    METADATA,
    FileRecord,
    Metadata,
    checkpoint_path,
    checkpoints_folder,
    complete_checkpoints,
    file_sha256,
)
from skippipe.training.optimizer import OptimizerBackend
from skippipe_scheduler.files import parse, read_json, write_atomically

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Saves what the runner and the optimizer hold. All ranks call `save` together."""

    def __init__(self, run_dir: Path, runner: Runner, optimizer: OptimizerBackend, keep_last: int) -> None:
        self._run_dir = run_dir
        self._runner = runner
        self._optimizer = optimizer
        self._keep_last = keep_last

    def save(self, metadata: Metadata) -> bool:
        """Write a checkpoint of the present state and say whether it is complete, the same on every rank.

        `metadata.files` is filled in here. A failure is logged by the rank on which it happened, and by rank 0.
        """
        final = checkpoint_path(self._run_dir, metadata.step)
        aside = final.with_name(f".{final.name}.tmp")
        phases: tuple[Callable[[], None], ...] = (
            lambda: self._on_first_rank(lambda: _make_empty(aside)),
            lambda: self._write_stages(aside),
            lambda: self._on_first_rank(lambda: _finish(aside, final, metadata)),
        )
        for phase in phases:
            if not self._all_succeed(phase, metadata.step):
                self._on_first_rank(lambda: shutil.rmtree(aside, ignore_errors=True))
                return False
        self._on_first_rank(self._remove_old)
        return True

    def _all_succeed(self, phase: Callable[[], None], step: int) -> bool:
        """Run one phase here and say whether it succeeded on all ranks."""
        failure = ""
        try:
            phase()
        except (OSError, SkipPipeError, SafetensorError) as reason:
            failure = str(reason)
        failed = self._runner.sum_over_ranks([float(failure != "")])[0]
        if failed and (failure or self._runner.rank == 0):
            logger.warning(
                "step %d: no checkpoint could be saved (%s); training goes on, earlier checkpoints are kept",
                step,
                failure or "another rank failed, see its message",
            )
        return not failed

    def _write_stages(self, aside: Path) -> None:
        """Write what this process answers for, and beside each file a record of it."""
        owned = self._runner.owned_parameters().keys()
        for index, stage in self._runner.stages.items():
            tensors = stage.state_dict_global()
            owner = tensors.keys() <= owned
            if owner:
                _write_recorded(aside / f"model-stage-{index}.safetensors", tensors)
            if owner or self._optimizer.sharded:
                part = f"-rank-{self._runner.rank}" if self._optimizer.sharded else ""
                _write_recorded(aside / f"optimizer-stage-{index}{part}.safetensors", self._optimizer.state(tensors))

    def _on_first_rank(self, action: Callable[[], None]) -> None:
        if self._runner.rank == 0:
            action()

    def _remove_old(self) -> None:
        for path in complete_checkpoints(self._run_dir)[: -self._keep_last]:
            # Renamed first, so that a crash in the middle leaves no half checkpoint under a final name.
            aside = path.with_name(f".{path.name}.tmp")
            try:
                path.rename(aside)
            except OSError as reason:
                logger.warning("%s: the old checkpoint cannot be removed (%s)", path, reason)
            shutil.rmtree(aside, ignore_errors=True)


def write_stages(run_dir: Path, metadata: Metadata, stages: Sequence[Mapping[str, Tensor]]) -> None:
    """Write a checkpoint of parameters alone, from one process: what a run begins at. `metadata.files` is filled in."""
    final = checkpoint_path(run_dir, metadata.step)
    aside = final.with_name(f".{final.name}.tmp")
    _make_empty(aside)
    for index, tensors in enumerate(stages):
        _write_recorded(aside / f"model-stage-{index}.safetensors", tensors)
    _finish(aside, final, metadata)


def remove_unfinished(run_dir: Path) -> None:
    """Remove what an interrupted save left behind."""
    for path in checkpoints_folder(run_dir).glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_recorded(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of tensors, and beside it the record that `_finish` collects."""
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
    _flush(path)
    record = FileRecord(size_bytes=path.stat().st_size, sha256=file_sha256(path))
    write_atomically(path.with_name(f"{path.name}.json"), record.model_dump_json())


def _finish(aside: Path, final: Path, metadata: Metadata) -> None:
    """Collect the records, write the metadata, give the checkpoint its name."""
    files = {}
    for path in sorted(aside.glob("*.safetensors.json")):
        files[path.name.removesuffix(".json")] = parse(
            FileRecord, read_json(path, CheckpointError), str(path), CheckpointError
        )
        path.unlink()
    complete = metadata.model_copy(update={"files": files})
    write_atomically(aside / METADATA, complete.model_dump_json(indent=1) + "\n")
    _flush(aside)
    if final.exists():  # damaged, else the run would have continued from it
        shutil.rmtree(final)
    aside.rename(final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
