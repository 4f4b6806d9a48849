"""Which plan of the set each step runs: a function of the step and the experiment alone, the same after a resume.

Full-depth steps come before all else; otherwise the phase of the curriculum gives the kind of plan (the main one where
there is no curriculum), and a draw from the seed chooses among the plans of that kind.
"""

import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from skippipe.config.experiment import Experiment
from skippipe.runtime.plans.plan_specs import FULL_DEPTH, draw_name, plan_kinds_of_phases


@dataclass(frozen=True)
class PlanSchedule:
    """Maps a step, counted from 1 as in metrics.jsonl, to the name of its plan."""

    kinds: Sequence[str]
    """The kind of plan of each phase."""
    last_steps: Sequence[int]
    """The last step of each phase."""
    num_draws: int
    full_depth_interval: int | None
    seed: int

    @classmethod
    def of(cls, experiment: Experiment) -> "PlanSchedule":
        """Return the schedule of an experiment's recipe over `training.max_steps`."""
        recipe = experiment.recipe
        shares = [phase.share for phase in recipe.depth_curriculum] or [1.0]
        scale = experiment.training.max_steps / sum(shares)
        last_steps = [round(end * scale) for end in accumulate(shares)]
        kinds = plan_kinds_of_phases(experiment)
        return cls(kinds, last_steps, recipe.redrawn_routes, recipe.full_depth_interval, experiment.seed)

    def plan_of(self, step: int) -> str:
        """Return the name of the plan of a step."""
        if self.full_depth_interval is not None and step % self.full_depth_interval == 0:
            return FULL_DEPTH
        phase = min(bisect_left(self.last_steps, step), len(self.kinds) - 1)
        draw = random.Random(f"{self.seed}/routes/{step}").randrange(self.num_draws)
        return draw_name(self.kinds[phase], draw)
