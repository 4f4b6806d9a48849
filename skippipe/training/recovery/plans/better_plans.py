"""Looks in the background for plans that suit the measured paces of nodes and links better than the present ones."""

import logging
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Final, NamedTuple

from skippipe.cluster.run_trace import watched_links
from skippipe.config.recovery_options import ReplanOptions
from skippipe.monitor.run_events import LinkPace, PaceChange
from skippipe.planning.plans_ahead import PlansAhead
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.training.recovery.plans.pace_watch import PaceWatch
from skippipe_scheduler.plan.recost import NodePair

READINGS: Final = 4
"""Of all links in `recovery.replan.window` steps: as many as a median needs to leave out one that is off."""
logger = logging.getLogger(__name__)


class BetterPlans(NamedTuple):
    """Plans at the present paces of nodes, everyone at the place that it has."""

    whole: PlanSet
    """Those of all nodes."""
    present: PlanSet
    """Those of the nodes that are there."""
    change: PaceChange


class _Paces(NamedTuple):
    """By what factor tasks of nodes and messages of links take longer than in the present plan."""

    nodes: Mapping[str, float]
    links: Mapping[NodePair, float]

    def since(self, earlier: "_Paces") -> "_Paces":
        """Return the same beside earlier paces."""
        nodes = {node: pace / earlier.nodes.get(node, 1.0) for node, pace in self.nodes.items()}
        links = {pair: pace / earlier.links.get(pair, 1.0) for pair, pace in self.links.items()}
        return _Paces(nodes, links)


class _Attempt(NamedTuple):
    """A search that is under way."""

    ahead: PlansAhead
    whole: PlanSet
    """The plans of all nodes at the paces for which it looks."""
    paces: _Paces
    changed: dict[str, float]
    changed_links: dict[NodePair, float]


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
        self._links = watched_links(present.main)
        of_readings = options.model_copy(update={"window": READINGS})
        self._link_watch = PaceWatch(self._links, of_readings, after_change=after_change)
        self._free_origins = free_origins
        self._search: _Attempt | None = None

    def observe(self, step: int, paces: Sequence[float], link_paces: Mapping[NodePair, float] | None = None) -> None:
        """Take the pace of each node in a step, in rank order; search where that is due, and see what was found.

        And those of links, where they were read: the next is due `READINGS` times in a window.
        """
        if self.found is not None:
            return
        is_due = self._watch.observe(step, paces)
        if link_paces is not None:
            is_due |= self._link_watch.observe(step, [link_paces.get(pair, 0.0) for pair in self._links])
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

    def _paces(self) -> _Paces:
        """Return what was measured; where nothing was, as much as all links together that have not changed."""
        measured = self._link_watch.measured
        transfer_s = self._present.main.costs.transfer_s
        usual = {pair: transfer_s[pair[0]][pair[1]] for pair in measured.keys() - self._link_watch.changed.keys()}
        planned_s = sum(usual.values())
        factor = sum(measured[pair] * seconds for pair, seconds in usual.items()) / planned_s if planned_s else 1.0
        both = measured | {(sink, source): pace for (source, sink), pace in measured.items()}
        links = {pair: both.get(pair, factor) for pair in permutations(self._whole.main.nodes, 2)} if measured else {}
        return _Paces(self._watch.estimates, links)

    def _begin(self) -> _Attempt:
        paces = self._paces()
        usual = sorted(paces.nodes.values())[len(paces.nodes) // 2]
        whole = self._whole.at_pace({**paces.nodes} | dict.fromkeys(self._lost, usual), paces.links)
        ahead = PlansAhead(
            whole,
            [self._lost],
            time_limit_s=self._options.search_s,
            lost_stage="routes_around",
            niceness=self._options.niceness,
            free_origins=self._free_origins,
        )
        return _Attempt(ahead, whole, paces, self._watch.changed, self._link_watch.changed)

    def _judge(self, search: _Attempt, step: int) -> None:
        """Keep what was found where it is better by enough, at the paces that nodes have now."""
        now, other = self._paces(), search.ahead.ready(self._lost)
        self._watch.settle(step)
        self._link_watch.settle(step)
        if other is None:
            return
        present_s = self._present.at_pace(*now).main.predicted.iteration_s
        other_s = other.at_pace(*now.since(search.paces)).main.predicted.iteration_s
        links = tuple(LinkPace(nodes=pair, pace=pace) for pair, pace in search.changed_links.items())
        change = PaceChange(paces=search.changed, links=links, time_ratio=other_s / present_s)
        if self._watch.is_worth_it(present_s, other_s):
            self.found = BetterPlans(search.whole if self._lost else other, other, change)
        else:
            logger.info(
                "step %d: %s; the plan stays, the best other one takes %.2f of its time",
                step,
                change.who,
                change.time_ratio,
            )
