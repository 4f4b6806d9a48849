"""What every node did in the last few steps, for the report: trace/rank-<r>.jsonl, one measured task or wait a line."""

import json
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from skippipe.runtime.runner import Span, TransferWait
from skippipe_scheduler.files import write_atomically

STEPS_KEPT = 3


class TraceRecorder:
    """Keeps tasks and waits of the newest steps in memory; all ranks record and write the same steps."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._path = run_dir / "trace" / f"rank-{rank}.jsonl"
        self._steps: deque[tuple[int, list[Span | TransferWait]]] = deque(maxlen=STEPS_KEPT)

    def record(self, step: int, spans: Iterable[Span], waits: Iterable[TransferWait]) -> None:
        """Remember one step; the oldest is forgotten."""
        self._steps.append((step, [*spans, *waits]))

    def write(self) -> None:
        """Replace the file; raise `SkipPipeError` where that is impossible."""
        lines = [json.dumps({"step": step} | entry._asdict()) for step, entries in self._steps for entry in entries]
        write_atomically(self._path, "".join(line + "\n" for line in lines))
