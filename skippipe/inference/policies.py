"""Which stages a microbatch runs at inference when only a share of the depth is kept."""

import random
from dataclasses import dataclass
from typing import Protocol

from skippipe.errors import InputError


class StagePolicy(Protocol):
    """Chooses the stages to run; stage 0 holds embedding and head and is always among them."""

    @property
    def name(self) -> str:
        """Name under which it is asked for."""
        ...

    def stages(self, num_stages: int, num_kept: int, draw: int) -> tuple[int, ...]:
        """Return `num_kept` stages in the order in which they run; `draw` numbers the independent choices."""
        ...


@dataclass(frozen=True)
class FullDepth:
    """Every stage, whatever share is asked for: the reference."""

    name: str = "full"

    def stages(self, num_stages: int, num_kept: int, draw: int) -> tuple[int, ...]:
        """Return all stages in order."""
        return tuple(range(num_stages))


@dataclass(frozen=True)
class RandomStages:
    """A uniform random subset of the stages other than 0, in order (SkipPipe, inference with stages removed)."""

    seed: int
    name: str = "random"

    def stages(self, num_stages: int, num_kept: int, draw: int) -> tuple[int, ...]:
        """Return stage 0 and `num_kept - 1` others; the same seed and draw always give the same stages."""
        generator = random.Random(f"{self.seed}/{num_stages}/{num_kept}/{draw}")
        return (0, *sorted(generator.sample(range(1, num_stages), num_kept - 1)))


def build_policy(name: str, seed: int) -> StagePolicy:
    """Return the policy called `name`."""
    if name == "random":
        return RandomStages(seed)
    if name == "full":
        return FullDepth()
    raise InputError(f"policy {name!r}: unknown; there are 'random' and 'full'")


def kept_stages(keep: float, num_stages: int) -> int:
    """Return how many stages a share of the depth means; raise `InputError` where no subset reaches it."""
    if not 0 < keep <= 1:
        raise InputError(f"--keep {keep}: expected a share above 0 and up to 1")
    kept = round(keep * num_stages)
    if kept < 1:
        raise InputError(
            f"--keep {keep}: leaves less than one of {num_stages} stages; the smallest share is {1 / num_stages:.2f}"
        )
    return kept
