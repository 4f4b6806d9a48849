"""metrics.jsonl: one JSON object a step."""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from skippipe.errors import InputError, StorageError
from skippipe.monitor.metrics import Metric, StepMetrics, with_current_keys
from skippipe_scheduler.files import json_lines, write_atomically

logger = logging.getLogger(__name__)

MOST_WAITING: Final = 100_000
"""Steps that are kept in memory while the storage takes none: some 50 MB."""


class MetricsWriter:
    """Appends steps to a file, each written out at once. Steps after `first_step` of an earlier try are removed.

    Steps that the storage does not take wait, and are written with a later one. With `continued` the file should hold
    all the `first_step` steps before; which are missing is said, and a file with damaged lines is kept as it was.
    """

    def __init__(self, path: Path, first_step: int = 0, *, continued: bool = False) -> None:
        lines = list(metrics_lines(path)) if path.exists() else []
        kept = [entry for entry in lines if entry is not None and entry[Metric.STEP] <= first_step]
        missing = first_step - len({entry[Metric.STEP] for entry in kept if entry[Metric.STEP] > 0})
        if missing > 0 and continued:
            logger.warning(
                "%s: %d of the %d steps before are missing or damaged%s",
                path,
                missing,
                first_step,
                _keep_damaged(path) if None in lines else "",
            )
        write_atomically(path, "".join(_line(entry) for entry in kept))
        self._path = path
        self._size_bytes = path.stat().st_size
        self._waiting: list[str] = []

    def write(self, metrics: StepMetrics) -> None:
        """Append one step; raise `StorageError` where that is impossible now: it is tried again with the next one."""
        self._waiting = [*self._waiting[1 - MOST_WAITING :], _line(metrics)]
        self._append()

    def close(self) -> None:
        """Try once more to write what waits; raise `StorageError` where that is impossible."""
        if self._waiting:
            self._append()

    def _append(self) -> None:
        """Write what waits behind the last whole line, whatever an attempt before has left there."""
        content = "".join(self._waiting).encode()
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                self._write_at_end(descriptor, content)
            finally:
                os.close(descriptor)
        except OSError as reason:
            raise StorageError(f"{self._path}: cannot be written ({reason.strerror or reason})") from None
        self._size_bytes += len(content)
        self._waiting = []

    def _write_at_end(self, descriptor: int, content: bytes) -> None:
        try:
            written = 0
            while written < len(content):
                written += os.pwrite(descriptor, content[written:], self._size_bytes + written)
        except OSError:
            with suppress(OSError):
                os.ftruncate(descriptor, self._size_bytes)
            raise


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the metrics of every step of a run.

    Args:
        path: The run's metrics.jsonl.

    Returns:
        A mapping for each step, in order; lines that a crash cut short are left out. The page on monitoring lists the
        keys with their units; files of earlier versions have them, too.

    Raises:
        InputError: The file cannot be read.

    Examples:
        >>> [(record["step"], record["tokens"]) for record in read_metrics(Path("runs/tiny/metrics.jsonl"))]
        [(1, 512), (2, 1024)]
    """
    path = Path(path)
    return [entry for entry in metrics_lines(path) if entry is not None]


def metrics_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield each line of a metrics file under the keys of `Metric`, None for one that a crash cut short.

    Raises `InputError` where the file cannot be read.
    """
    try:
        for content in json_lines(path):
            is_step = content is not None and type(content.get(Metric.STEP)) is int
            yield with_current_keys(content) if content is not None and is_step else None
    except OSError as reason:
        raise InputError(f"{path}: cannot be read ({reason.strerror}); give a run that has been trained") from None


def merged_metrics(path: Path, other: Path) -> str:
    """Return the lines of two metrics files of one run, in order; of a step that both have, that of the first."""
    steps = {entry[Metric.STEP]: entry for file in (other, path) for entry in metrics_lines(file) if entry is not None}
    return "".join(_line(steps[step]) for step in sorted(steps))


def _keep_damaged(path: Path) -> str:
    """Copy a file whose damaged lines are about to go; return what to say of it."""
    copy = path.with_name(f"damaged-{path.name}")
    try:
        shutil.copyfile(path, copy)
    except OSError as reason:
        return f"; the file as it was cannot be kept ({reason.strerror or reason})"
    return f"; the file as it was is kept as {copy.name}"


def _line(metrics: Mapping[Any, Any]) -> str:
    return json.dumps(dict(metrics)) + "\n"
