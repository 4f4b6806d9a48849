"""The run directory: what lies in it, on each disk that has one, and what a run goes on from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from skippipe.checkpoint.disks.disk_view import LayerRange
from skippipe.checkpoint.disks.gathering import Gathering
from skippipe.checkpoint.disks.peer_files import PeerFiles
from skippipe.checkpoint.disks.remote_folder import RemoteFolder
from skippipe.checkpoint.disks.run_disks import RunDisks, cannot_be_written, remove_marks
from skippipe.checkpoint.reader import DIRECTORY, LATEST, checkpoints_folder, found_checkpoints
from skippipe.checkpoint.soundness import damage_on_any_rank, newest_sound_checkpoint, set_aside
from skippipe.checkpoint.writer import remove_unfinished, restore_replaced
from skippipe.config.experiment import Experiment
from skippipe.config.experiment_file import save_experiment
from skippipe.errors import CheckpointError, ConfigError, InputError
from skippipe.planning.recipe_plans import save_recipe_plans
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.ranks.agreement import on_all_ranks, on_first_rank
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic

FILES: Final = (
    "config.yaml",
    "plan.json",
    "metrics.jsonl",
    "memory.json",
    "events.jsonl",
    "nodes.json",
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


def record_inputs(experiment: Experiment, plans: PlanSet, nonce: str) -> None:
    """Write config.yaml and the plans and remove what an interrupted start left behind: once on each disk.

    `nonce` is that of this start's `RunDisks`.

    Raises `StorageError` where that is impossible.
    """
    run_dir = experiment.run_path
    try:
        (run_dir / "trace").mkdir(parents=True, exist_ok=True)
        for stale in (run_dir / "trace").glob("rank-*.jsonl"):
            stale.unlink()
    except OSError as reason:
        raise cannot_be_written(run_dir, reason) from None
    remove_marks(run_dir, but=nonce)
    remove_unfinished(run_dir)
    save_experiment(experiment, run_dir / "config.yaml")
    plans.main.save(run_dir / "plan.json")
    save_recipe_plans(plans, run_dir)


def choose_checkpoint(
    experiment: Experiment,
    context: DistributedContext,
    disks: RunDisks,
    peers: PeerFiles | None,
    stages: Sequence[LayerRange],
) -> Path | None:
    """Return the checkpoint to continue from, whole and the same on every rank, or None to begin anew.

    Where hosts share no disk, `peers` bring here what this process's stages need of it, which have these layers.
    With resume: auto it is the newest sound one; damaged ones after it are set aside. Raises `CheckpointError` where
    there are checkpoints and none is sound, or where a named one is not.
    """
    resume = experiment.checkpoint.resume
    url = experiment.checkpoint.remote_save_folder
    remote = None if url is None else RemoteFolder(url)
    gathering = None if peers is None and remote is None else Gathering(context, disks, peers, remote)
    if resume == "never":
        return None
    if disks.is_first:
        restore_replaced(experiment.run_path)
    if resume != "auto":
        named = checkpoints_folder(experiment.run_path) / resume if DIRECTORY.fullmatch(resume) else Path(resume)
        damage = damage_on_any_rank(named, context) if gathering is None else gathering.bring(named, stages)
        on_first_rank(context, Topic.DAMAGED_CHECKPOINTS, lambda: _check_named(named, damage))
        return named
    if gathering is None:
        newest, damaged = newest_sound_checkpoint(experiment.run_path, context)
    else:
        newest, damaged = gathering.newest(experiment.run_path, stages)
    if newest is not None and damaged:
        move = (lambda: set_aside(damaged, newest)) if disks.is_first else lambda: None
        on_all_ranks(context, Topic.DAMAGED_CHECKPOINTS, move)
    return newest


def _check_named(named: Path, damage: str | None) -> None:
    if damage is not None:
        raise CheckpointError(f"checkpoint.resume: {named}: {damage.removeprefix(f'{named}: ')}; use another")


def check_nothing_beyond(experiment: Experiment, step: int) -> None:
    """Raise `ConfigError` where the run directory holds checkpoints of steps after `step`."""
    beyond = [path for path in found_checkpoints(experiment.run_path) if _step_of(path) > step]
    if beyond:
        raise ConfigError(
            f"checkpoint.resume: {experiment.checkpoint.resume!r} starts after step {step}, but {beyond[-1]} is there "
            "already; choose another run_dir, or move that checkpoint away, or use checkpoint.resume=auto"
        )


def check_nothing_beyond_elsewhere(experiment: Experiment, step: int) -> None:
    """Raise `ConfigError` where the remote folder holds checkpoints of steps after `step`: auto would go on from them.

    With resume: auto it is not asked: what is newer there is damaged, and was passed over.
    """
    resume, url = experiment.checkpoint.resume, experiment.checkpoint.remote_save_folder
    if url is None or resume == "auto":
        return
    beyond = [f"step-{found:08d}" for found in RemoteFolder(url).steps() if found > step]
    if beyond:
        raise ConfigError(
            f"checkpoint.resume: {resume!r} starts after step {step}, but checkpoint.remote_save_folder {url} has "
            f"{', '.join(beyond)} already; choose another remote_save_folder, or move those checkpoints away from "
            "there, or use checkpoint.resume=auto"
        )


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
