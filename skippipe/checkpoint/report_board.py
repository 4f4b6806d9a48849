"""How the rank that completes a checkpoint learns what every rank has written of it, without the training's groups.

Each rank puts its reports into the store that all ranks share; the readers, one on each disk, take them out.
"""

import threading
import time
from collections.abc import Iterable

from pydantic import Field
from torch._C._distributed_c10d import Store

from skippipe.checkpoint.held_files import FileName
from skippipe.checkpoint.reader import FileRecord, Metadata
from skippipe.errors import CheckpointError
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.store_names import Board, store_of_board
from skippipe_scheduler.files import StrictModel, parse, parse_json


class FileReport(StrictModel):
    """What one rank wrote, or why it could not."""

    files: dict[FileName, FileRecord]
    second: dict[FileName, FileRecord] = Field(default_factory=dict)
    """Files that another rank answers for and of which this one has written its own copy, to another disk."""
    failure: str = ""
    metadata: Metadata | None = None
    """What the checkpoint belongs to, from rank 0: the same on all disks to the byte."""


class ReportBoard:
    """The reports of one run's checkpoints; a single process needs no store."""

    def __init__(self, store: Store | None, rank: int, readers: Iterable[int] = (0,)) -> None:
        """`readers` are the ranks that collect, on all ranks the same."""
        self._store = None if store is None else store_of_board(store, Board.CHECKPOINT)
        self._own: dict[str, FileReport] = {}
        self._rank = rank
        self._readers = frozenset(readers)

    def post(self, step: int, report: FileReport, part: str = "files") -> None:
        """Publish what this rank did for a part of the checkpoint of `step`; RuntimeError where the store is gone."""
        self._own[part] = report
        if self._store is not None and self._readers - {self._rank}:
            self._store.set(f"{step}/{part}/{self._rank}", report.model_dump_json())

    def collect(
        self, step: int, abandoned: threading.Event, grace_s: float, ranks: Iterable[int], part: str = "files"
    ) -> list[FileReport]:
        """Return the reports of `ranks`, on a reader, as soon as all have reported.

        Raises `CheckpointError` where a rank failed, or has not reported `grace_s` after `abandoned` was set.
        """
        reports = {rank: self._take(step, rank, abandoned, grace_s, part) for rank in ranks}
        failures = [f"rank {rank}: {report.failure}" for rank, report in reports.items() if report.failure]
        if failures:
            raise CheckpointError("; ".join(failures))
        return list(reports.values())

    def _take(self, step: int, rank: int, abandoned: threading.Event, grace_s: float, part: str) -> FileReport:
        if self._store is None or rank == self._rank:
            return self._own[part]
        key = f"{step}/{part}/{rank}"
        deadline_s = None
        while not self._store.check([key]):  # a blocking wait would keep the other thread from the store
            if abandoned.is_set():
                deadline_s = deadline_s or time.monotonic() + grace_s
                if time.monotonic() > deadline_s:
                    raise CheckpointError(f"rank {rank} did not finish its part before the run ended")
            time.sleep(time_limits.STORE_POLL_S)
        text = self._store.get(key)
        if self._is_last_reader(key, rank):
            self._store.delete_key(key)
        place = f"what rank {rank} reports of step {step}"
        return parse(FileReport, parse_json(text, place, CheckpointError), place, CheckpointError)

    def _is_last_reader(self, key: str, rank: int) -> bool:
        """Count this reader; return whether all have read now."""
        assert self._store is not None
        others = len(self._readers - {rank})
        if others == 1:
            return True
        counter = f"{key}/read"
        if self._store.add(counter, 1) < others:
            return False
        self._store.delete_key(counter)
        return True
