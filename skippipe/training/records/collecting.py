"""What several disks have of one run, brought to the disk of rank 0: records by a run, all of it by `collect`."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from skippipe.checkpoint.disks.gathering import Gathering
from skippipe.checkpoint.disks.peer_files import PeerFiles, open_peer_files
from skippipe.checkpoint.disks.remote_folder import RemoteFolder
from skippipe.checkpoint.disks.run_disks import RunDisks, cannot_be_written, open_run_disks
from skippipe.checkpoint.soundness import newest_sound_checkpoint
from skippipe.config.experiment_file import load_run
from skippipe.errors import InputError
from skippipe.monitor.metrics_file import merged_metrics
from skippipe.runtime.ranks.agreement import all_gather_json, on_all_ranks
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic
from skippipe_scheduler.files import json_lines, replace_file

TRACES: Final = ("trace/rank-*.jsonl",)
RECORDS: Final = (
    *TRACES,
    "config.yaml",
    "plan.json",
    "metrics.jsonl",
    "events.jsonl",
    "wandb_id",
    "epochs/*.json",
    "plans/*.json",
    "tokenizer/*.json",
)
"""What a run directory has beside its checkpoints."""
RECORD_NAME = re.compile(r"([a-z]+/)?[A-Za-z0-9_-][A-Za-z0-9_.-]*")
"""Names that another disk may give: inside of the run directory, and no hidden file."""


def collect_run(run_dir: Path, context: DistributedContext) -> Path | None:
    """Bring the newest checkpoint and all records of a run to the disk of rank 0; all ranks call this together.

    Returns:
        The checkpoint, which is whole there; None where the run has none.

    Raises:
        CheckpointError: There are checkpoints, and the disks together have none whole.
        StorageError: The run directory cannot be written.
    """
    with open_run_disks(run_dir, context) as disks:
        if disks.shared:
            remote = on_all_ranks(context, Topic.RUN_DIRECTORY, lambda: _remote_folder(run_dir))
            if remote is None:
                return newest_sound_checkpoint(run_dir, context)[0]
            return Gathering(context, disks, None, remote).newest(run_dir, None)[0]
        with open_peer_files(context) as peers:
            bring_records(run_dir, context, disks, peers, RECORDS)
            # Rank 0 has the records by now, and looks; a disk that needs nothing fetches nothing.
            remote = on_all_ranks(context, Topic.RUN_DIRECTORY, lambda: _remote_folder(run_dir))
            has_remote = any(all_gather_json(context, Topic.RUN_DIRECTORY, lambda: remote is not None))
            is_target = disks.own == disks.of_rank[0]
            gathering = Gathering(context, disks, peers, remote) if has_remote else Gathering(context, disks, peers)
            return gathering.newest(run_dir, None if is_target else [])[0]


def _remote_folder(run_dir: Path) -> RemoteFolder | None:
    """Return the second place of a run's checkpoints, where its experiment is here and names one."""
    if not (run_dir / "config.yaml").exists():
        return None
    url = load_run(run_dir).checkpoint.remote_save_folder
    return None if url is None else RemoteFolder(url)


def bring_records(
    run_dir: Path, context: DistributedContext, disks: RunDisks, peers: PeerFiles, patterns: Sequence[str]
) -> None:
    """Bring the files that match to the disk of rank 0; all ranks call this together.

    Metrics and events of all disks come together in one file each; of other files, those that are missing there come.
    """
    offered: list[str] = []

    def offer() -> list[str]:
        if not disks.is_first or disks.rank == 0:
            return []
        names = [str(path.relative_to(run_dir)) for pattern in patterns for path in sorted(run_dir.glob(pattern))]
        for name in names:
            offered.append(_offered(name))
            peers.offer(offered[-1], (run_dir / name).read_bytes)
        return names

    def fetch_all(told: Sequence[Iterable[str]]) -> None:
        for rank, names in enumerate(told):
            for name in names:
                _take(run_dir, name, peers, rank)

    try:
        told = all_gather_json(context, Topic.DISK_RECORDS, offer)
        on_all_ranks(context, Topic.DISK_RECORDS, lambda: fetch_all(told) if disks.rank == 0 else None)
    finally:
        peers.withdraw(offered)


def _take(run_dir: Path, name: str, peers: PeerFiles, rank: int) -> None:
    """Fetch one record of a rank's disk into this one."""
    if not RECORD_NAME.fullmatch(name):
        raise InputError(f"rank {rank} has a record named {name[:80]!r}, which is no file of a run directory")
    path = run_dir / name
    merge = {"metrics.jsonl": merged_metrics, "events.jsonl": _merged_lines}.get(name)
    if path.exists() and merge is None:
        return
    content = peers.fetch(rank, _offered(name))
    try:
        if path.exists() and merge is not None:
            other = path.with_name(f".{path.name}.other")
            replace_file(other, content)
            content = merge(path, other).encode()
            other.unlink()
        replace_file(path, content)
    except OSError as reason:
        raise cannot_be_written(run_dir, reason) from None


def _merged_lines(path: Path, other: Path) -> str:
    """Return the lines of two files of events, each once, in the order of their times."""
    found: dict[str, dict[str, Any]] = {}
    for line in (*json_lines(path), *json_lines(other)):
        if line is not None:
            found.setdefault(json.dumps(line), line)
    # Times are whole seconds; of the epochs of one start, which may begin in the same, each has a higher number.
    order = sorted(found, key=lambda text: (str(found[text].get("time", "")), found[text].get("epoch", 0)))
    return "".join(f"{text}\n" for text in order)


def _offered(name: str) -> str:
    return f"record/{name}"
