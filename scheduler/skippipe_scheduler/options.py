"""How long and how to search, and what a search tells while it runs."""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Event

from skippipe_scheduler.budget import Budget

_MARGIN = 0.94
"""Share of the time limit that the search may use; the rest is for writing the plan down."""


@dataclass(frozen=True)
class Progress:
    """What a search reports when it has found something better."""

    elapsed_s: float
    evaluations: int
    iteration_s: float
    lower_bound_s: float


@dataclass(frozen=True)
class Robustness:
    """Plans are judged by their mean time over samples of lognormal jitter instead of the nominal time."""

    sigma: float
    samples: int = 6


@dataclass(frozen=True)
class SolveOptions:
    """How long and how to search.

    With `max_evaluations` (steps of the search) the clock is ignored: equal seeds then give equal plans (`wall_s` is
    recorded as 0). `num_workers` searches run at a time; CP-SAT uses one worker where the result must be repeatable.
    `stop` ends the search early, from any thread.
    """

    time_limit_s: float = 10.0
    seed: int = 0
    max_evaluations: int | None = None
    num_workers: int = 2
    robustness: Robustness | None = None
    progress: Callable[[Progress], None] | None = None
    stop: Event | None = None

    def budget(self) -> Budget:
        """Start the budget of a whole solve."""
        return Budget(self.time_limit_s * _MARGIN, self.max_evaluations, self.stop)
