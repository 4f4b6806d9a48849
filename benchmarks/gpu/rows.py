"""The rows by priority: what is measured, and how much of the time each may take.

Nothing is imported that may be missing on a bare machine: what was carried there is found by the rows' own processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from setting import Figures

    from skippipe.config.experiment import Experiment


@dataclass(frozen=True)
class Row:
    """A module with `experiments` and `measure`, and its share of the time.

    The shares are chosen: training speed and memory say most, and convergence takes all that is left.
    """

    module: str
    share: float

    def experiments(self, folder: Path, *, rehearse: bool) -> list[Experiment]:
        """Return the experiments that the row needs plans for."""
        make: Callable[..., list[Experiment]] = import_module(self.module).experiments
        return make(folder, rehearse=rehearse)

    def measure(self, figures: Figures, folder: Path, carried: Path | None) -> None:
        """Measure; every figure counts from when it is added."""
        import_module(self.module).measure(figures, folder, carried)


ROWS: Mapping[str, Row] = {
    "device": Row("device_tests", 0.12),
    "training": Row("training_speed", 0.15),
    "memory": Row("memory_estimate", 0.13),
    "generation": Row("generation_speed", 0.15),
    "ranks": Row("several_ranks", 0.15),
    "nccl": Row("nccl", 0.08),
    "convergence": Row("convergence", 0.22),
}
