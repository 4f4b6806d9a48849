"""The run directory: made by rank 0, seen by all, and never mixed from two runs."""

import time
import uuid
from pathlib import Path
from typing import Final

from skippipe.checkpoint.reader import LATEST, found_checkpoints
from skippipe.checkpoint.soundness import damage_on_any_rank, newest_sound_checkpoint, set_aside
from skippipe.checkpoint.writer import remove_unfinished
from skippipe.config.experiment import Experiment
from skippipe.config.experiment_file import save_experiment
from skippipe.errors import CheckpointError, ConfigError, InputError, StorageError
from skippipe.planning.recipe_plans import save_recipe_plans
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.agreement import on_all_ranks, on_first_rank
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic

FILES: Final = (
    "config.yaml",
    "plan.json",
    "metrics.jsonl",
    "memory.json",
    "events.jsonl",
    "members.json",
    "owner.json",
    ".owner.lock",
    LATEST,
    "trace/rank-*.jsonl",
)
FOLDERS: Final = ("checkpoints", "trace", "plans", "epochs", "tokenizer")


def check_kinds(run_dir: Path) -> None:
    """Raise `InputError` where a folder stands in a file's place, or the other way round: nothing is changed then."""
    for path in (found for name in FILES for found in run_dir.glob(name)):
        if not path.is_file():
            raise InputError(f"{path}: a folder, where a run keeps a file; move it away")
    for path in (found for name in FOLDERS for found in run_dir.glob(name)):
        if not path.is_dir():
            raise InputError(f"{path}: a file, where a run keeps a folder; move it away")


def open_run_directory(experiment: Experiment, context: DistributedContext) -> None:
    """Make the run directory and make sure that every rank sees it; nothing that lies in it is changed.

    Raises `StorageError` where it cannot be written, or where a rank sees another directory under this path.
    """
    mark = experiment.run_path / ".visible"
    expected = on_first_rank(context, Topic.RUN_DIRECTORY, lambda: _leave_mark(mark))
    on_all_ranks(context, Topic.RUN_DIRECTORY_SEEN, lambda: _see(mark, expected, context.rank))
    if context.rank == 0:
        mark.unlink(missing_ok=True)


def record_inputs(experiment: Experiment, plans: PlanSet) -> None:
    """Write config.yaml and the plans and remove what an interrupted start left behind: on rank 0, once it goes on.

    Raises `StorageError` where that is impossible.
    """
    run_dir = experiment.run_path
    try:
        (run_dir / "trace").mkdir(parents=True, exist_ok=True)
        for stale in (run_dir / "trace").glob("rank-*.jsonl"):
            stale.unlink()
    except OSError as reason:
        raise _cannot_be_written(run_dir, reason) from None
    remove_unfinished(run_dir)
    save_experiment(experiment, run_dir / "config.yaml")
    plans.main.save(run_dir / "plan.json")
    save_recipe_plans(plans, run_dir)


def _leave_mark(mark: Path) -> str:
    """Write something unique into the directory and return it."""
    nonce = uuid.uuid4().hex
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(nonce)
    except OSError as reason:
        raise _cannot_be_written(mark.parent, reason) from None
    return nonce


def _cannot_be_written(run_dir: Path, reason: OSError) -> StorageError:
    return StorageError(f"{run_dir}: cannot be written ({reason.strerror or reason}); choose another run_dir")


def _see(mark: Path, expected: str, rank: int) -> None:
    deadline_s = time.monotonic() + time_limits.VISIBLE_FILE_S
    while True:
        try:
            if mark.read_text() == expected:
                return
        except OSError:
            pass
        if time.monotonic() > deadline_s:
            raise StorageError(
                f"{mark.parent.absolute()}: rank {rank} does not see the directory that rank 0 made; "
                "put run_dir on storage that every rank shares"
            )
        time.sleep(time_limits.FILE_POLL_S)


def choose_checkpoint(experiment: Experiment, context: DistributedContext) -> Path | None:
    """Return the checkpoint to continue from, whole and the same on every rank, or None to begin anew.

    With resume: auto it is the newest sound one; damaged ones after it are set aside. Raises `CheckpointError` where
    there are checkpoints and none is sound, or where a named one is not.
    """
    resume = experiment.checkpoint.resume
    if resume == "never":
        return None
    if resume != "auto":
        damage = damage_on_any_rank(Path(resume), context)
        on_first_rank(context, Topic.DAMAGED_CHECKPOINTS, lambda: _check_named(resume, damage))
        return Path(resume)
    newest, damaged = newest_sound_checkpoint(experiment.run_path, context)
    if newest is not None and damaged:
        on_first_rank(context, Topic.DAMAGED_CHECKPOINTS, lambda: set_aside(damaged, newest))
    return newest


def _check_named(resume: str, damage: str | None) -> None:
    if damage is not None:
        raise CheckpointError(f"checkpoint.resume: {resume}: {damage.removeprefix(f'{resume}: ')}; use another")


def check_nothing_beyond(experiment: Experiment, step: int) -> None:
    """Raise `ConfigError` where the run directory holds checkpoints of steps after `step`."""
    beyond = [path for path in found_checkpoints(experiment.run_path) if _step_of(path) > step]
    if beyond:
        raise ConfigError(
            f"checkpoint.resume: {experiment.checkpoint.resume!r} starts after step {step}, but {beyond[-1]} is there "
            "already; choose another run_dir, or move that checkpoint away, or use checkpoint.resume=auto"
        )


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
