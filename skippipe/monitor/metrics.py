"""`metrics.jsonl`: one JSON object a step."""

import json
from pathlib import Path
from typing import Any

from skippipe.errors import InputError

Metrics = dict[str, Any]


class MetricsWriter:
    """Appends to a run's metrics. Lines after `last_step` (from before a resume) are dropped first."""

    def __init__(self, path: Path, last_step: int) -> None:
        kept = [entry for entry in read_metrics(path) if entry["step"] <= last_step] if path.exists() else []
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        aside.replace(path)
        self.tokens = int(kept[-1].get("tokens", 0)) if kept else 0
        self.elapsed_s = float(kept[-1].get("perf/elapsed_s", 0.0)) if kept else 0.0
        self._stream = path.open("a", encoding="utf-8")

    def write(self, metrics: Metrics) -> None:
        """Append one step and flush, so that a crash loses at most the line in hand."""
        self._stream.write(json.dumps(metrics) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_metrics(path: Path) -> list[Metrics]:
    """Return the steps of a metrics file; a last line cut off by a crash is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; train the run first") from None
    entries: list[Metrics] = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise InputError(f"{path}: line {number} is not JSON") from None
    return entries
