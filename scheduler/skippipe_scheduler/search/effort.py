"""How much a budget can pay for: steps of the search, starts, steps on the loads."""

import math
from dataclasses import dataclass

from skippipe_scheduler.budget import Budget
from skippipe_scheduler.search.joint_model import is_small_enough
from skippipe_scheduler.search.kernel.jit import slowness
from skippipe_scheduler.search.tuning import LOCAL_SEARCH, PortfolioTuning
from skippipe_scheduler.slots.slot_model import SlotModel


@dataclass(frozen=True)
class SearchEffort:
    """The effort of a portfolio search over `num_variants` of a problem on `num_workers` threads."""

    budget: Budget
    num_workers: int
    num_variants: int
    tuning: PortfolioTuning

    def steps_left(self, slot_model: SlotModel) -> float:
        """Return about how many steps all workers can still make."""
        if self.budget.evaluations is not None:
            return self.budget.evaluations - self.budget.spent
        step_s = self.tuning.step_s + self.tuning.task_s * slot_model.num_tasks
        if slot_model.num_tasks > LOCAL_SEARCH.large_tasks:
            step_s = self.tuning.large_step_s + self.tuning.large_task_s * slot_model.num_tasks
        return self.num_workers * self.budget.left_s / slowness() / step_s

    def full_annealing(self, slot_model: SlotModel) -> int:
        """Return the steps of an annealing that is not cut short."""
        tuning, tasks = self.tuning, slot_model.num_tasks
        if joint_model_follows(slot_model):
            return tuning.steps_per_task_before_joint * tasks
        if slot_model.given_placement() is not None:
            return tuning.steps_per_task * tasks
        return int(tuning.steps_per_task * tasks * min(1.0, tasks / tuning.steps_from_tasks))

    def race_part(self, slot_model: SlotModel) -> float:
        """Return the share of what is left of the budget that the race gets."""
        return self.tuning.race_part_before_joint if joint_model_follows(slot_model) else self.tuning.race_part

    def affordable_starts(self, slot_model: SlotModel) -> int:
        """Return how many full annealings fit into the race, over all variants."""
        given = slot_model.given_placement() is not None
        most = self.tuning.most_starts_of_given if given else self.tuning.most_starts
        affordable = int(self.race_part(slot_model) * self.steps_left(slot_model) / self.full_annealing(slot_model))
        return min(most * self.num_variants, affordable)

    def affordable_variants(self, slot_model: SlotModel) -> int:
        """Return how many variants have time for their first schedules, one at least."""
        first_s = self.tuning.first_schedule_task_s * slot_model.num_tasks * slowness()
        return max(1, int(self.tuning.construction_part * self.budget.left_s / first_s))

    def balancing_steps(self, slot_model: SlotModel, starts: int) -> int:
        """Return the steps on the loads that each of so many starts of one variant gets."""
        tuning = self.tuning
        if self.budget.evaluations is not None:
            affordable = int(tuning.balancing_part * self.budget.evaluations / starts)
            return max(tuning.least_repeatable_balancing_steps, affordable)
        step_s = slowness() * (tuning.balancing_step_s + tuning.balancing_slot_s * len(slot_model.stage_of))
        working_s = tuning.balancing_part * self.num_workers * self.budget.left_s
        return max(tuning.least_balancing_steps, int(working_s / step_s / starts / self.num_variants))

    def balancing_limit_s(self, starts: int) -> float:
        """Return the seconds that the steps on the loads of each start may take, where there is a clock."""
        if self.budget.evaluations is not None:
            return math.inf
        at_once = min(starts, self.num_workers)
        return max(1e-3, self.tuning.balancing_part * at_once * self.budget.left_s / starts / self.num_variants)

    def path_set_expansions(self) -> int:
        """Return how many nodes the path search may expand."""
        tuning = self.tuning
        if self.budget.evaluations is not None:
            affordable = self.budget.evaluations // tuning.path_set_evaluations
        else:
            affordable = int(tuning.path_set_expansions_per_s * self.budget.left_s)
        return min(tuning.path_set_expansions, max(tuning.least_path_set_expansions, affordable))


def joint_model_follows(slot_model: SlotModel) -> bool:
    """Return whether the joint model will go over all routes and so needs much of the time."""
    return slot_model.given_placement() is not None and is_small_enough(slot_model)
