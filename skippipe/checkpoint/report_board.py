"""How rank 0 learns what every rank has written of a checkpoint, without touching the training's groups.

Each rank puts one report into the store that all ranks share; rank 0 takes them out.
"""

import threading
import time

from torch._C._distributed_c10d import Store

from skippipe.checkpoint.reader import FileName, FileRecord
from skippipe.errors import CheckpointError
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.store_names import Board, store_of_board
from skippipe_scheduler.files import StrictModel, parse, parse_json


class FileReport(StrictModel):
    """What one rank wrote, or why it could not."""

    files: dict[FileName, FileRecord]
    failure: str = ""


class ReportBoard:
    """The reports of one run's checkpoints; a single process needs no store."""

    def __init__(self, store: Store | None, rank: int, world_size: int) -> None:
        self._store = None if store is None else store_of_board(store, Board.CHECKPOINT)
        self._own: FileReport | None = None
        self._rank = rank
        self._world_size = world_size

    def post(self, step: int, report: FileReport) -> None:
        """Publish what this rank wrote for the checkpoint of `step`; RuntimeError where the store is gone."""
        if self._store is None or self._rank == 0:
            self._own = report
        else:
            self._store.set(f"{step}/{self._rank}", report.model_dump_json())

    def collect(self, step: int, abandoned: threading.Event, grace_s: float) -> dict[str, FileRecord]:
        """Return the records of all files, on rank 0, as soon as every rank has reported.

        Raises `CheckpointError` where a rank failed, or has not reported `grace_s` after `abandoned` was set.
        """
        reports = [self._own] + [self._take(step, rank, abandoned, grace_s) for rank in range(1, self._world_size)]
        failures = [
            f"rank {rank}: {report.failure}" for rank, report in enumerate(reports) if report and report.failure
        ]
        if failures:
            raise CheckpointError("; ".join(failures))
        return {name: record for report in reports if report for name, record in sorted(report.files.items())}

    def _take(self, step: int, rank: int, abandoned: threading.Event, grace_s: float) -> FileReport | None:
        if self._store is None:
            return None
        key = f"{step}/{rank}"
        deadline_s = None
        while not self._store.check([key]):  # a blocking wait would keep the other thread from the store
            if abandoned.is_set():
                deadline_s = deadline_s or time.monotonic() + grace_s
                if time.monotonic() > deadline_s:
                    raise CheckpointError(f"rank {rank} did not finish its part before the run ended")
            time.sleep(time_limits.STORE_POLL_S)
        text = self._store.get(key)
        self._store.delete_key(key)
        place = f"what rank {rank} reports of step {step}"
        return parse(FileReport, parse_json(text, place, CheckpointError), place, CheckpointError)
