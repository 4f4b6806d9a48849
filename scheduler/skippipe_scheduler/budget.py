"""How long a search may go on: wall-clock seconds, or a number of steps where the result must be repeatable."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

_STEPS_PER_UNIT = 5000
"""Steps that cost about as much as one unit of CP-SAT's deterministic time. Chosen: a repeatable search has no clock,
so the order of magnitude counts (measured: 26,000 to 90,000 steps a second; a unit is about a second)."""


class Budget:
    """A wall-clock limit or, where `evaluations` is given, that many steps and no clock at all.

    `stop` ends it early, from any thread.
    """

    def __init__(self, limit_s: float, evaluations: int | None = None, stop: threading.Event | None = None) -> None:
        self._start_s = time.perf_counter()
        self.limit_s = limit_s
        self.evaluations = evaluations
        self.spent = 0
        self.stop = stop or threading.Event()

    @property
    def repeatable(self) -> bool:
        """Whether the budget is counted in steps."""
        return self.evaluations is not None

    @property
    def elapsed_s(self) -> float:
        """Seconds since the budget began."""
        return time.perf_counter() - self._start_s

    @property
    def left_s(self) -> float:
        """Seconds left of the limit; none once somebody asked to stop."""
        return 0.0 if self.stop.is_set() else max(0.0, self.limit_s - self.elapsed_s)

    @property
    def fraction(self) -> float:
        """Share used up, 0 to 1."""
        if self.evaluations is not None:
            return min(1.0, self.spent / max(1, self.evaluations))
        return min(1.0, self.elapsed_s / max(1e-9, self.limit_s))

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left, or somebody asked to stop."""
        return self.stop.is_set() or self.fraction >= 1.0

    def share(self, part: float) -> "Budget":
        """Return a budget that begins now and has `part` of what is left here (charge it here with `charge`)."""
        if self.evaluations is not None:
            return Budget(self.limit_s, max(1, int(part * (self.evaluations - self.spent))), self.stop)
        return Budget(part * self.left_s, None, self.stop)

    def charge(self, used: "Budget") -> None:
        """Count what a share has spent."""
        self.spent += used.spent

    def configure(
        self, solver: Any, seed: int, num_workers: int, part: float, at_most_s: float, least: float = 0.05
    ) -> None:
        """Limit a CP-SAT `solver` to `part` of what is left, or to deterministic time on one worker if repeatable.

        That time is at least `least` units, which for small models are much less than as many seconds.
        """
        solver.parameters.random_seed = seed % 2**31
        solver.parameters.catch_sigint_signal = False  # who wants to stop sets `stop`
        if self.evaluations is not None:
            left = part * (self.evaluations - self.spent) / _STEPS_PER_UNIT
            solver.parameters.num_workers = 1
            solver.parameters.max_deterministic_time = max(least, min(at_most_s, left))
            return
        solver.parameters.num_workers = num_workers
        solver.parameters.max_time_in_seconds = max(0.02, min(at_most_s, part * self.left_s))

    def run(self, solver: Any, model: Any) -> Any:
        """Return the status of CP-SAT's `solver` on `model`; `stop` ends it early.

        It runs in a thread of its own, because signals reach Python only while the main thread runs Python.
        """
        with ThreadPoolExecutor(1) as pool:
            solving = pool.submit(solver.solve, model)
            while not wait([solving], timeout=0.1).done:
                if self.stop.is_set():
                    solver.stop_search()
            return solving.result()
