"""How long an iteration takes on the nodes that are left, by the planner that a run asks after a loss."""

from collections.abc import Set

from skippipe.errors import InfeasibleError
from skippipe.planning.surviving_plans import plans_without
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe_scheduler.options import LostStage
from skippipe_scheduler.plan.plan import Plan

NO_LIMIT_S = 3600.0
"""The search is bounded by its steps, so that it gives the same plans on every machine."""


class SurvivingPaces:
    """Iteration times by the set of nodes that are left, each planned once."""

    def __init__(self, plan: Plan, *, max_evaluations: int) -> None:
        self.plan = plan
        self._max_evaluations = max_evaluations
        self._known: dict[tuple[frozenset[str], LostStage], float | None] = {}

    @property
    def num_planned(self) -> int:
        """How many sets of nodes have been planned for."""
        return len({members for members, _ in self._known})

    def iteration_s(self, members: Set[str], lost_stage: LostStage = "stop") -> float | None:
        """Return the seconds of an iteration on these nodes, or None where there is no plan for them.

        Never fewer than those of all nodes: a plan that fewer nodes walk faster would be open to all of them.
        """
        if all(members & {*stage.nodes} for stage in self.plan.stages):
            lost_stage = "stop"  # no stage is lost: both ways have the same plan
        key = frozenset(members), lost_stage
        if key not in self._known:
            self._known[key] = self._planned_s(members, lost_stage)
        return self._known[key]

    def _planned_s(self, members: Set[str], lost_stage: LostStage) -> float | None:
        whole_s = self.plan.predicted.iteration_s
        lost = [node for node in self.plan.nodes if node not in members]
        if not lost:
            return whole_s
        try:
            left = plans_without(
                PlanSet(self.plan, {}),
                lost,
                time_limit_s=NO_LIMIT_S,
                max_evaluations=self._max_evaluations,
                lost_stage=lost_stage,
            )
        except InfeasibleError:
            return None
        return max(whole_s, left.main.predicted.iteration_s)
