"""Looks in the background for plans that suit the measured paces of nodes better than the present ones."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

from skippipe.config.recovery_options import ReplanOptions
from skippipe.monitor.run_events import PaceChange
from skippipe.planning.plans_ahead import PlansAhead
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.training.recovery.plans.pace_watch import PaceWatch

logger = logging.getLogger(__name__)


class BetterPlans(NamedTuple):
    """Plans at the present paces of nodes, everyone at the place that it has."""

    whole: PlanSet
    """Those of all nodes."""
    present: PlanSet
    """Those of the nodes that are there."""
    change: PaceChange


class _Attempt(NamedTuple):
    """A search that is under way."""

    ahead: PlansAhead
    whole: PlanSet
    """The plans of all nodes at the paces for which it looks."""
    paces: dict[str, float]
    changed: dict[str, float]


class BetterPlanSearch:
    """Watches the paces of an epoch's nodes, on its first rank; what it finds stays until the epoch ends.

    The search is a process of low priority. A found plan counts where its exact time, main plan against main
    plan at the paces measured by then, is better by `recovery.replan.gain`.
    """

    def __init__(
        self,
        whole: PlanSet,
        present: PlanSet,
        options: ReplanOptions,
        *,
        free_origins: bool = False,
        after_change: bool = False,
    ) -> None:
        """Begin with the plans of all nodes and of those that are there.

        `after_change` as in `PaceWatch`, `free_origins` as for `improved_plans`.
        """
        self.found: BetterPlans | None = None
        self._whole, self._present, self._options = whole, present, options
        self._lost = [node for node in whole.main.nodes if node not in present.main.nodes]
        self._watch = PaceWatch(present.main.nodes, options, after_change=after_change)
        self._free_origins = free_origins
        self._search: _Attempt | None = None

    def observe(self, step: int, paces: Sequence[float]) -> None:
        """Take the pace of each node in a step, in rank order; search where that is due, and see what was found."""
        if self.found is not None:
            return
        is_due = self._watch.observe(step, paces)
        if self._search is None:
            if is_due:
                self._search = self._begin()
        elif self._search.ahead.wait(0):
            search, self._search = self._search, None
            search.ahead.close()
            self._judge(search, step)

    def close(self) -> None:
        """End the search."""
        if self._search is not None:
            self._search.ahead.close()
            self._search = None

    def _begin(self) -> _Attempt:
        paces = self._watch.estimates
        usual = sorted(paces.values())[len(paces) // 2]
        whole = self._whole.at_pace(paces | dict.fromkeys(self._lost, usual))
        ahead = PlansAhead(
            whole,
            [self._lost],
            time_limit_s=self._options.search_s,
            lost_stage="routes_around",
            niceness=self._options.niceness,
            free_origins=self._free_origins,
        )
        return _Attempt(ahead, whole, paces, self._watch.changed)

    def _judge(self, search: _Attempt, step: int) -> None:
        """Keep what was found where it is better by enough, at the paces that nodes have now."""
        now, other = self._watch.estimates, search.ahead.ready(self._lost)
        self._watch.settle(step)
        if other is None:
            return
        present_s = self._present.at_pace(now).main.predicted.iteration_s
        since = {node: now[node] / pace for node, pace in search.paces.items()}
        other_s = other.at_pace(since).main.predicted.iteration_s
        change = PaceChange(paces=search.changed, time_ratio=other_s / present_s)
        if self._watch.is_worth_it(present_s, other_s):
            self.found = BetterPlans(search.whole if self._lost else other, other, change)
        else:
            logger.info(
                "step %d: %s; the plan stays, the best other one takes %.2f of its time",
                step,
                change.who,
                change.time_ratio,
            )
