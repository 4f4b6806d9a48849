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
        """Return how many starts there is time for, over all variants: each with a full annealing in the race, or with
        well balanced loads where these decide.
        """
        given = slot_model.given_placement() is not None
        most = self.tuning.most_starts_of_given if given else self.tuning.most_starts
        affordable = int(self.race_part(slot_model) * self.steps_left(slot_model) / self.full_annealing(slot_model))
        if self.loads_decide(slot_model):
            affordable = self._balanced_starts(slot_model)
        return min(most * self.num_variants, affordable)

    def loads_decide(self, slot_model: SlotModel) -> bool:
        """Return whether the time is better spent on loads than on exact orders: where transfers share capacities."""
        return self.budget.evaluations is None and slot_model.shares_capacity

    def affordable_variants(self, slot_model: SlotModel) -> int:
        """Return how many variants have time for their first schedules, one at least."""
        constructed = int(self.tuning.construction_part * self.budget.left_s / self._first_schedule_s(slot_model))
        if self.loads_decide(slot_model):
            constructed = min(constructed, self._balanced_starts(slot_model) // self.num_workers)
        return max(1, constructed)

    def balancing_steps(self, slot_model: SlotModel, starts: int) -> int:
        """Return the steps on the loads that each of so many starts of one variant gets."""
        tuning, part = self.tuning, self._balancing_part(slot_model)
        if self.budget.evaluations is not None:
            affordable = int(part * self.budget.evaluations / starts)
            return max(tuning.least_repeatable_balancing_steps, affordable)
        working_s = part * self.num_workers * self.budget.left_s
        step_s = self._balancing_step_s(slot_model)
        return max(tuning.least_balancing_steps, int(working_s / step_s / starts / self.num_variants))

    def balancing_limit_s(self, slot_model: SlotModel, starts: int) -> float:
        """Return the seconds that the steps on the loads of each start may take, where there is a clock."""
        if self.budget.evaluations is not None:
            return math.inf
        at_once, part = min(starts, self.num_workers), self._balancing_part(slot_model)
        return max(1e-3, part * at_once * self.budget.left_s / starts / self.num_variants)

    def trial_steps(self, slot_model: SlotModel, placements: int) -> int:
        """Return the steps on the loads with which each of so many placements is tried."""
        return max(1, int(self.tuning.trial_part * self.balancing_steps(slot_model, placements)))

    def trial_limit_s(self, slot_model: SlotModel, placements: int) -> float:
        """Return the seconds that they may take, where there is a clock."""
        return self.tuning.trial_part * self.balancing_limit_s(slot_model, placements)

    def _balanced_starts(self, slot_model: SlotModel) -> int:
        """Return how many starts, of all variants, can be balanced well and scheduled."""
        tuning = self.tuning
        balancing_s = tuning.balancing_steps_per_slot * len(slot_model.stage_of) * self._balancing_step_s(slot_model)
        start_s = balancing_s + self._first_schedule_s(slot_model)
        return int(tuning.balancing_part_of_shared * self.num_workers * self.budget.left_s / start_s)

    def _first_schedule_s(self, slot_model: SlotModel) -> float:
        return self.tuning.first_schedule_task_s * slot_model.num_tasks * slowness()

    def _balancing_part(self, slot_model: SlotModel) -> float:
        return self.tuning.balancing_part_of_shared if slot_model.shares_capacity else self.tuning.balancing_part

    def _balancing_step_s(self, slot_model: SlotModel) -> float:
        tuning = self.tuning
        slot_s = tuning.shared_balancing_slot_s if slot_model.shares_capacity else tuning.balancing_slot_s
        return slowness() * (tuning.balancing_step_s + slot_s * len(slot_model.stage_of))

    def looks_for_few_sequences(self, slot_model: SlotModel) -> bool:
        """Return whether there is time to look for few different sequences of stages."""
        quick = slot_model.lists_all_sequences and len(slot_model.sequences) <= self.tuning.few_sequences_of
        return quick or self.budget.repeatable or self.budget.limit_s >= self.tuning.few_sequences_limit_s

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
