"""Keeps RUN/nodes.json up to date, on the rank that writes the metrics."""

import time
from pathlib import Path
from typing import Final

from skippipe.monitor.live.node_board import NodeBoard
from skippipe.monitor.live.run_status import RunStatus, write_status
from skippipe.monitor.metrics import Metric, StepMetrics

SHORTEST_INTERVAL_S: Final = 1.0
"""From one writing to the next: nobody reads faster."""


class StatusSink:
    """Writes how the run stands after a step, always after the last one and the first one of a plan; see `Sink`."""

    def __init__(self, run_dir: Path, max_steps: int, board: NodeBoard) -> None:
        self._run_dir, self._max_steps, self._board = run_dir, max_steps, board
        self._next_s = 0.0
        self._plan_hash = ""

    def write(self, metrics: StepMetrics) -> None:
        """Replace the file where that is due; raise `StorageError` where it is impossible."""
        now_s = time.monotonic()
        is_last, is_new = metrics[Metric.STEP] >= self._max_steps, self._plan_hash != self._board.plan_hash
        if now_s < self._next_s and not (is_last or is_new):
            return
        status = RunStatus(
            written_at_s=time.time(),
            step=metrics[Metric.STEP],
            max_steps=self._max_steps,
            loss=metrics[Metric.TRAIN_LOSS],
            tokens_per_s=metrics[Metric.TOKENS_PER_S],
            iteration_s=metrics[Metric.ITERATION_S],
            predicted_s=metrics[Metric.PREDICTED_S],
            plan_hash=self._board.plan_hash,
            nodes=self._board.nodes,
            links=self._board.links,
        )
        write_status(status, self._run_dir)
        self._next_s, self._plan_hash = now_s + SHORTEST_INTERVAL_S, status.plan_hash

    def close(self) -> None:
        """Leave the file as it is: another process may write it by now."""
