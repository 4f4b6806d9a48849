"""What every row of the planner's table has: what it measures, with what limits, and what comes of it."""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from skippipe_scheduler.options import SolveOptions
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.problem.problem import Problem, load_problem

OVERTIME_S = 2.0
"""By how much a whole command may outlast its time limit: imports, and what is behind the search."""


@dataclass(frozen=True)
class Case:
    """How to measure a row: the folder of the instances, the seconds of each solve, the seed, whether to hurry."""

    data: Path
    time_limit_s: float
    seed: int
    quick: bool = False

    def load(self, name: str, prepare: Callable[[Problem], Problem] | None = None) -> Problem:
        """Read one of the instances in the data folder, changed by `prepare`."""
        problem = load_problem(self.data / f"{name}.json")
        return prepare(problem) if prepare else problem

    def options(self) -> SolveOptions:
        """Return the options of every solve."""
        return SolveOptions(time_limit_s=self.time_limit_s, seed=self.seed)


@dataclass(frozen=True)
class Measured:
    """One result. `met` says whether the bar was met, None where there is none."""

    value: float
    unit: str = "s"
    bound_s: float | None = None
    wall_s: float | None = None
    peak_gib: float | None = None
    met: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the table. `bar` puts into words what `measure` checks."""

    name: str
    time_limit_s: float
    bar: str
    measure: Callable[[Case], Measured]


@dataclass(frozen=True)
class Bar:
    """What a solve has to reach; None is no demand."""

    at_most_s: float | None = None
    bound_at_least_s: float | None = None
    gap_at_most: float | None = None

    def met_by(self, plan: Plan) -> bool | None:
        """Return whether the plan's prediction meets every demand, None without demands."""
        iteration_s, bound_s = plan.predicted.iteration_s, plan.predicted.lower_bound_s
        checks = []
        if self.at_most_s is not None:
            checks.append(iteration_s <= self.at_most_s)
        if self.bound_at_least_s is not None:
            checks.append(bound_s >= self.bound_at_least_s)
        if self.gap_at_most is not None:
            checks.append(iteration_s - bound_s <= self.gap_at_most * iteration_s)
        return all(checks) if checks else None

    def __str__(self) -> str:
        parts = []
        if self.at_most_s is not None:
            parts.append(f"≤ {self.at_most_s:g} s")
        if self.bound_at_least_s is not None:
            parts.append(f"bound ≥ {self.bound_at_least_s:g} s")
        if self.gap_at_most is not None:
            parts.append(f"gap ≤ {self.gap_at_most:.0%}")
        return ", ".join(parts)


def peak_memory_gib() -> float:
    """Return the most memory that this process and its largest child have held, in GiB."""
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_maxrss for usage in usages) / 2**20


def timed(make: Callable[[], Plan]) -> tuple[Plan, float]:
    """Make a plan, prove it, and return it with the seconds that making it took."""
    begin_s = time.perf_counter()
    plan = make()
    wall_s = time.perf_counter() - begin_s
    validate(plan)
    return plan, wall_s


def of_plan(plan: Plan, wall_s: float) -> Measured:
    """Return the iteration of a plan and its bound as a result."""
    return Measured(plan.predicted.iteration_s, bound_s=plan.predicted.lower_bound_s, wall_s=wall_s)


def gap(plan: Plan) -> str:
    """Return in words how much of an iteration could still be gained at most."""
    return f"gap {1 - plan.predicted.lower_bound_s / plan.predicted.iteration_s:.1%}"
