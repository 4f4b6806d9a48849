"""metrics.jsonl: one JSON object a step."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from skippipe.errors import InputError, StorageError
from skippipe.monitor.metrics import Metric, StepMetrics, with_current_keys
from skippipe_scheduler.files import write_atomically


class MetricsWriter:
    """Appends steps to a file, each written out at once. Steps after `first_step` of an earlier try are removed."""

    def __init__(self, path: Path, first_step: int = 0) -> None:
        kept = [entry for entry in read_metrics(path) if entry[Metric.STEP] <= first_step] if path.exists() else []
        write_atomically(path, "".join(_line(entry) for entry in kept))
        self._path = path
        self._stream: TextIO = path.open("a", encoding="utf-8")

    def write(self, metrics: StepMetrics) -> None:
        """Append one step; raise `StorageError` where that is impossible."""
        try:
            self._stream.write(_line(metrics))
            self._stream.flush()
        except OSError as reason:
            raise StorageError(f"{self._path}: cannot be written ({reason.strerror or reason})") from None

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
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
    return [entry for entry in metrics_lines(path) if entry is not None]


def metrics_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield each line of a metrics file under the keys of `Metric`, None for one that a crash cut short.

    Raises `InputError` where the file cannot be read.
    """
    for content in json_lines(path):
        is_step = content is not None and isinstance(content.get(Metric.STEP), int)
        yield with_current_keys(content) if content is not None and is_step else None


def json_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield each line's JSON object, None for a damaged line; raise `InputError` where the file cannot be read."""
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            for line in stream:
                try:
                    content = json.loads(line)
                except json.JSONDecodeError:
                    content = None
                yield content if isinstance(content, dict) else None
    except OSError as reason:
        raise InputError(f"{path}: cannot be read ({reason.strerror}); give a run that has been trained") from None


def _line(metrics: Mapping[Any, Any]) -> str:
    return json.dumps(dict(metrics)) + "\n"
