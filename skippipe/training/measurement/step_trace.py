"""What every node did in the last few steps, for the report: trace/rank-<r>.jsonl, one measured task or wait a line."""

import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from skippipe.runtime.runner import Span, TransferWait
from skippipe_scheduler.files import write_atomically

STEPS_KEPT = 3


class TracedStep(NamedTuple):
    """What this process did in a step."""

    step: int
    entries: Sequence[Span | TransferWait]

    def lines(self) -> str:
        """Return one JSON object a line."""
        return "".join(json.dumps({"step": self.step} | entry._asdict()) + "\n" for entry in self.entries)


class TraceRecorder:
    """Keeps tasks and waits of the newest steps in memory; all ranks record and write the same steps."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._path = run_dir / "trace" / f"rank-{rank}.jsonl"
        self._steps: deque[TracedStep] = deque(maxlen=STEPS_KEPT)

    def record(self, step: int, spans: Iterable[Span], waits: Iterable[TransferWait]) -> None:
        """Remember one step; the oldest is forgotten."""
        self._steps.append(TracedStep(step, [*spans, *waits]))

    @property
    def newest(self) -> TracedStep | None:
        """The newest of these steps."""
        return self._steps[-1] if self._steps else None

    def write(self, check: Callable[[], None]) -> None:
        """Replace the file; raise `SkipPipeError` where that is impossible, or `check` raises it."""
        write_atomically(self._path, "".join(traced.lines() for traced in self._steps), check=check)
