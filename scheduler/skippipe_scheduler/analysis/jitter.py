"""How long iterations of a plan take when every task and transfer varies at random."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.simulate import simulate


@dataclass(frozen=True)
class JitterSummary:
    """Iteration times over `samples` seeds; p50 and p95 are percentiles (the sample at or above that share)."""

    samples: int
    mean_s: float
    p50_s: float
    p95_s: float
    max_s: float


def sample_iterations(
    plan: Plan, samples: int, *, jitter_sigma: float, seed: int = 0, slowdown: Mapping[str, float] | None = None
) -> tuple[float, ...]:
    """Return the iteration times in seconds of `samples` runs of `plan`, with the seeds `seed`, `seed` + 1, ..."""
    return tuple(
        simulate(plan, slowdown=slowdown, jitter_sigma=jitter_sigma, seed=seed + index).iteration_s
        for index in range(samples)
    )


def summarise(iterations_s: tuple[float, ...]) -> JitterSummary:
    """Return mean and percentiles of at least one iteration time in seconds."""
    ordered = sorted(iterations_s)
    return JitterSummary(
        len(ordered), statistics.fmean(ordered), _percentile(ordered, 50), _percentile(ordered, 95), ordered[-1]
    )


def _percentile(ordered: list[float], percent: int) -> float:
    return ordered[-(-len(ordered) * percent // 100) - 1]
