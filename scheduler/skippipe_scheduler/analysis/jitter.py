"""How long iterations of a plan take when every task and transfer varies at random."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.simulate import simulate


@dataclass(frozen=True)
class JitterSummary:
    """Iteration times over some seeds; a percentile is the sample at or above that share.

    Examples:
        >>> summary = summarise((1.0, 2.0, 3.0, 6.0))
        >>> summary.p50_s, summary.p95_s, summary.max_s
        (2.0, 6.0, 6.0)
    """

    samples: int
    """How many iterations."""
    mean_s: float
    """Mean in seconds."""
    p50_s: float
    """Median in seconds."""
    p95_s: float
    """95th percentile in seconds."""
    max_s: float
    """The longest in seconds."""


def sample_iterations(
    plan: Plan, samples: int, *, jitter_sigma: float, seed: int = 0, slowdown: Mapping[str, float] | None = None
) -> tuple[float, ...]:
    """Simulate a plan many times with random times of tasks and transfers.

    Args:
        plan: The plan.
        samples: How many iterations.
        jitter_sigma: Every task and transfer takes its time by a lognormal factor of this sigma (median 1).
        seed: Seed of the first iteration; the next ones have the next seeds.
        slowdown: Factor on the task times of single nodes, by name.

    Returns:
        The iteration times in seconds.

    Raises:
        DeadlockError: The order of the plan makes nodes wait for each other.

    Examples:
        >>> iterations_s = sample_iterations(plan, 20, jitter_sigma=0.2)
        >>> len(iterations_s), min(iterations_s) < max(iterations_s)
        (20, True)
        >>> sample_iterations(plan, 1, jitter_sigma=0.0) == (timeline.iteration_s,)
        True
    """
    return tuple(
        simulate(plan, slowdown=slowdown, jitter_sigma=jitter_sigma, seed=seed + index).iteration_s
        for index in range(samples)
    )


def summarise(iterations_s: tuple[float, ...]) -> JitterSummary:
    """Return mean and percentiles of iteration times.

    Args:
        iterations_s: Iteration times in seconds, at least one.

    Returns:
        The same in five numbers.

    Examples:
        >>> summarise((1.0, 2.0, 3.0, 6.0)).mean_s
        3.0
    """
    ordered = sorted(iterations_s)
    return JitterSummary(
        len(ordered), statistics.fmean(ordered), _percentile(ordered, 50), _percentile(ordered, 95), ordered[-1]
    )


def _percentile(ordered: list[float], percent: int) -> float:
    return ordered[-(-len(ordered) * percent // 100) - 1]
