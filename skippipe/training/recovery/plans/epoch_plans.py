"""The plans of a run for whoever is in it: those that are known, and those that are made ahead of a loss."""

from collections.abc import Collection, Sequence

from skippipe.config.experiment import Experiment
from skippipe.errors import SkipPipeError
from skippipe.planning.moved_nodes import MovedNodes
from skippipe.planning.plans_ahead import PlansAhead
from skippipe.planning.surviving_plans import plans_without
from skippipe.runtime.plans.plan_schedule import PlanSchedule
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.training.recovery.lost_stage.situation import Situation
from skippipe_scheduler.plan.idle_nodes import with_idle_nodes

DECIDERS = 2
"""Members that make plans ahead: the first one that lives decides, and it may be the first that is lost."""


class EpochPlans:
    """One process's plans; `whole` are those of all nodes, at the places that they have now."""

    def __init__(self, experiment: Experiment, whole: PlanSet) -> None:
        self.whole = whole
        self.moves = MovedNodes(experiment)
        self._options = experiment.recovery
        self._schedule = PlanSchedule.of(experiment)
        self._known: dict[frozenset[str], PlanSet] = {frozenset(): whole}
        self._ahead: PlansAhead | None = None

    def take(self, whole: PlanSet, present: PlanSet | None = None) -> None:
        """Have the plans of all nodes at other places or paces, where they are others.

        With those `present` of the nodes that are there, where they were searched before.
        """
        if whole.hash != self.whole.hash:
            self.close()
            self.whole, self._known = whole, {}  # else plans for all nodes are searched ahead
            if present is not None:
                self._known[frozenset(whole.main.nodes) - frozenset(present.main.nodes)] = present

    def without(self, whole: PlanSet, lost: Collection[str]) -> PlanSet:
        """Return the plans without these nodes: the ones before, those made ahead, or new ones."""
        if whole is not self.whole:
            return self._made(whole, lost, self._options.planning_s)
        key = frozenset(lost)
        ahead = None if self._ahead is None else self._ahead.ready(key)
        if key not in self._known:
            self._known[key] = ahead or self._made(self.whole, lost, self._options.planning_s)
        return self._known[key]

    def with_joining(self, plans: PlanSet, situation: Situation, after_step: int) -> PlanSet:
        """Return the plans of the members and the one of their first iteration, where it is another one.

        That is so where some have come and others stand at their stages: in that iteration only those who stand have
        microbatches, as in the epoch before.
        """
        come = [node for node in situation.members if node not in situation.standing]
        if not come or not all(situation.standing_nodes(plans.main.stage_of[node]) for node in come):
            return plans
        lost = [*situation.lost, *come]
        try:
            before = self._known.get(frozenset(lost)) or self._made(self.whole, lost, 0.0)
            followed = self._schedule.plan_of(after_step + 1)
            return plans.with_joining(with_idle_nodes(before[followed], plans[followed]))
        except SkipPipeError:  # other rules hold for those who stand alone: they wait for those who have come
            return plans

    def plan_ahead(self, present: Sequence[str], rank: int) -> None:
        """Begin to make the plans for the loss of each node, on the two members that decide first."""
        self.close()
        missing = [node for node in self.whole.main.nodes if node not in present]
        self._forget_all_but(frozenset(missing))
        if not self._options.plans_ahead or rank >= DECIDERS:
            return
        losses = [sorted([*missing, node]) for node in present]
        if missing:
            losses.insert(0, [])
        unknown = [loss for loss in losses if frozenset(loss) not in self._known]
        if not unknown:
            return
        limit_s = self._options.planning_s
        self._ahead = PlansAhead(self.whole, unknown, time_limit_s=limit_s, lost_stage="routes_around")

    def close(self) -> None:
        """Make no plans ahead any more; those that are made stay."""
        if self._ahead is None:
            return
        ahead, self._ahead = self._ahead, None
        ahead.close()
        self._known = ahead.made | self._known

    def _forget_all_but(self, missing: frozenset[str]) -> None:
        """Keep the plans that the next loss or return may ask for: others would add up with every change."""
        self._known = {lost: plans for lost, plans in self._known.items() if not lost or len(lost ^ missing) <= 1}

    def _made(self, whole: PlanSet, lost: Collection[str], limit_s: float) -> PlanSet:
        return plans_without(whole, lost, time_limit_s=limit_s, lost_stage="routes_around")
