"""metrics.jsonl: one JSON object a step."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from skippipe.errors import InputError, StorageError
from skippipe_scheduler.files import write_atomically


class MetricsWriter:
    """Appends steps to a file, each written out at once. Steps after `first_step` of an earlier try are removed."""

    def __init__(self, path: Path, first_step: int = 0) -> None:
        kept = [entry for entry in read_metrics(path) if entry["step"] <= first_step] if path.exists() else []
        write_atomically(path, "".join(_line(entry) for entry in kept))
        self._path = path
        self._stream: TextIO = path.open("a", encoding="utf-8")

    def write(self, metrics: Mapping[str, Any]) -> None:
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
    """Return the complete lines of a metrics file in order; lines that a crash cut short are left out.

    Raises `InputError` where there is no such file.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as reason:
        raise InputError(f"{path}: cannot be read ({reason.strerror}); give a run that has been trained") from None
    entries = []
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


def _line(metrics: Mapping[str, Any]) -> str:
    return json.dumps(dict(metrics)) + "\n"
