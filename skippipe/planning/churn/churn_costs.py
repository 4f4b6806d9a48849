"""What a loss costs each method, in seconds, and how often a checkpoint pays."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Self

from skippipe.errors import ConfigError

BYTES_PER_PARAMETER = 12
"""A weight and the two moments of AdamW, each of 4 bytes."""


@dataclass(frozen=True)
class ChurnCosts:
    """Seconds of what happens at losses and returns, with where they come from.

    The first four add up to what `benchmarks/faults/results.md` has for a death: 1.35 s at the median until the new
    epoch began, of which 0.2 s were for planning (7 processes on 2 cores).
    """

    detection: float = 0.02
    """Until a death is noticed: connections close within some 15 ms. A silent host is noticed after
    `recovery.silence_s`."""
    agreement: float = 0.05
    """Until those left agree: `benchmarks/membership/results.md` has 0.066 s at the median with the detection."""
    planning: float = 1.0
    """For a plan without several nodes: the default of `recovery.planning_s`. Those without one are made ahead."""
    groups: float = 1.1
    """Until connections and programs are made anew: the rest of the median above."""
    restart: float = 12.0
    """Until processes started again have read a checkpoint and train. `benchmarks/launchers/results.md` has 22 to 27 s
    for whole runs that are killed before their first step, with two starts in each; a large model has more to read."""
    checkpoint: float = 1.0
    """For which training stands still for a checkpoint. Chosen: the copy of what is then written in the background."""
    rebuild: float = 30.0
    """Until CheckFree has rebuilt a stage from its neighbours: about 30 s in its paper."""

    def with_changes(self, changes: Mapping[str, float]) -> Self:
        """Return these costs with others for some names; raises `ConfigError` for an unknown one."""
        names = [field.name for field in fields(self)]
        for name in changes:
            if name not in names:
                raise ConfigError(f"--cost {name}: there is no such cost; there are {', '.join(names)}")
        return replace(self, **changes)


def lost_share(interval_s: float, checkpoint_s: float, restart_s: float, mtbf_s: float) -> float:
    """Return the share of time that checkpoint-restart loses, to the first order in interval / MTBF.

    A checkpoint in each interval, and at a loss the restart and half an interval on the mean (Young, "A first order
    approximation to the optimum checkpoint interval", CACM 17(9), 1974).
    """
    return checkpoint_s / interval_s + (restart_s + interval_s / 2) / mtbf_s


def best_interval_s(checkpoint_s: float, mtbf_s: float) -> float:
    """Return the seconds between checkpoints that lose least: sqrt(2 C MTBF), where `lost_share` has its minimum.

    Daly ("A higher order estimate of the optimum checkpoint interval", FGCS 22(3), 2006) adds terms that matter where a
    checkpoint takes as long as half the MTBF; then the interval is the MTBF.
    """
    if checkpoint_s >= mtbf_s / 2:
        return mtbf_s
    return math.sqrt(2 * checkpoint_s * mtbf_s)
