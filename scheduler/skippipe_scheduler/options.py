"""How long and how to search, and what a search tells while it runs."""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import Literal

from skippipe_scheduler.budget import Budget
from skippipe_scheduler.errors import InputError

_MARGIN = 0.94
"""Share of the time limit that the search may use; the rest is for exact times and writing the plan. Chosen."""
EXACT_TASK_S = 4e-5
"""Seconds for the exact times of each task, where that is more. Measured: 9 s for 257,000 tasks."""
_LEAST_PART = 0.3
"""But this share of the time limit at least. Chosen."""

LostStage = Literal["stop", "routes_around"]
"""What becomes of a stage without any node: nothing goes on, or all routes leave it out."""


@dataclass(frozen=True)
class Progress:
    """What a search reports when it has found something better.

    Examples:
        >>> reports = []
        >>> found = solve(problem, SolveOptions(max_evaluations=50, progress=reports.append))
        >>> reports[-1].iteration_s == found.predicted.iteration_s
        True
    """

    elapsed_s: float
    """Wall-clock seconds since the search began."""
    evaluations: int
    """Steps of the search so far."""
    iteration_s: float
    """Iteration time in seconds of the best plan so far."""
    lower_bound_s: float
    """No plan is shorter than this, in seconds, as far as is known by now."""


@dataclass(frozen=True)
class Robustness:
    """Plans are judged by their mean time over samples of lognormal jitter instead of the nominal time.

    Examples:
        >>> steady = solve(problem, SolveOptions(max_evaluations=20, robustness=Robustness(sigma=0.2, samples=2)))
        >>> len(steady.microbatches)
        6
    """

    sigma: float
    """Sigma of the lognormal factor (median 1) on every task and transfer."""
    samples: int = 6
    """How many samples a plan is judged by."""


@dataclass(frozen=True)
class SolveOptions:
    """How long and how to search.

    Examples:
        >>> within_a_minute = SolveOptions(time_limit_s=60.0)
        >>> repeatable = SolveOptions(max_evaluations=100, seed=3)
        >>> solve(problem, repeatable).hash == solve(problem, repeatable).hash
        True
    """

    time_limit_s: float = 10.0
    """Seconds of wall-clock time."""
    seed: int = 0
    """Seed of the search's random choices."""
    max_evaluations: int | None = None
    """Steps of the search, a budget in place of the clock: equal seeds then give equal plans."""
    num_workers: int = 2
    """How many searches run at a time; CP-SAT uses one worker where the result must be repeatable."""
    robustness: Robustness | None = None
    """How plans are judged under jitter; by their nominal time where not given."""
    progress: Callable[[Progress], None] | None = None
    """Called with every improvement."""
    stop: Event | None = None
    """Ends the search early, from any thread."""

    def __post_init__(self) -> None:
        if not isinstance(self.time_limit_s, int | float) or not self.time_limit_s >= 0:
            raise InputError(f"time_limit_s: {self.time_limit_s!r}; give a number of seconds")

    def budget(self, num_tasks: int = 0) -> Budget:
        """Start the budget of a whole solve, whose plan has so many tasks."""
        searched_s = min(self.time_limit_s * _MARGIN, self.time_limit_s - num_tasks * EXACT_TASK_S)
        return Budget(max(_LEAST_PART * self.time_limit_s, searched_s), self.max_evaluations, self.stop)
