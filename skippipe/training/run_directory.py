"""The run directory: made by rank 0, seen by all, and never mixed from two runs."""

import time
import uuid
from pathlib import Path

from skippipe.checkpoint.reader import checkpoint_path, complete_checkpoints, latest_checkpoint
from skippipe.checkpoint.writer import remove_unfinished
from skippipe.config.experiment import Experiment
from skippipe.config.experiment_file import save_experiment
from skippipe.errors import CheckpointError, ConfigError, StorageError
from skippipe.planning.recipe_plans import save_recipe_plans
from skippipe.plans.plan_set import PlanSet
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.agreement import on_all_ranks, on_first_rank
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic


def open_run_directory(experiment: Experiment, plans: PlanSet, context: DistributedContext) -> None:
    """Make the run directory, write config.yaml and the plans, and make sure that every rank sees it.

    Raises `StorageError` where it cannot be written, or where a rank sees another directory under this path.
    """
    mark = experiment.run_path / ".visible"
    expected = on_first_rank(context, Topic.RUN_DIRECTORY, lambda: _prepare(experiment, plans, mark))
    on_all_ranks(context, Topic.RUN_DIRECTORY_SEEN, lambda: _see(mark, expected, context.rank))
    if context.rank == 0:
        mark.unlink(missing_ok=True)


def _prepare(experiment: Experiment, plans: PlanSet, mark: Path) -> str:
    """Write what belongs into the directory; return what stands in the mark."""
    run_dir = experiment.run_path
    nonce = uuid.uuid4().hex
    try:
        (run_dir / "trace").mkdir(parents=True, exist_ok=True)
        for stale in (run_dir / "trace").glob("rank-*.jsonl"):
            stale.unlink()
        mark.write_text(nonce)
    except OSError as reason:
        raise StorageError(
            f"{run_dir}: cannot be written ({reason.strerror or reason}); choose another run_dir"
        ) from None
    remove_unfinished(run_dir)
    save_experiment(experiment, run_dir / "config.yaml")
    plans.main.save(run_dir / "plan.json")
    save_recipe_plans(plans, run_dir)
    return nonce


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
    """Return the checkpoint to continue from, the same on every rank, or None to begin anew.

    Raises `ConfigError` where the run directory holds checkpoints beyond it, which the run would mix with its own.
    """
    run_dir = experiment.run_path
    resume = experiment.checkpoint.resume
    if resume == "auto":
        newest: int | None = on_first_rank(context, Topic.NEWEST_CHECKPOINT, lambda: _newest_step(run_dir))
        return checkpoint_path(run_dir, newest) if newest is not None else None
    return None if resume == "never" else Path(resume)


def _newest_step(run_dir: Path) -> int | None:
    found = latest_checkpoint(run_dir)
    return _step_of(found) if found is not None else None


def check_nothing_beyond(experiment: Experiment, step: int) -> None:
    """Raise `ConfigError` where the run directory holds complete checkpoints of steps after `step`."""
    beyond = [path for path in complete_checkpoints(experiment.run_path) if _step_of(path) > step]
    if beyond:
        raise ConfigError(
            f"checkpoint.resume: {experiment.checkpoint.resume!r} starts after step {step}, but {beyond[-1]} is there "
            "already; choose another run_dir, or move that checkpoint away, or use checkpoint.resume=auto"
        )


def _step_of(path: Path) -> int:
    digits = path.name.removeprefix("step-")
    if not digits.isdigit():
        raise CheckpointError(f"{path}: not a checkpoint directory of the form step-00001000")
    return int(digits)
