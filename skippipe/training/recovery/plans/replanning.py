"""Better plans in a run under way: what each member tells for it, and the search on the first rank."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from skippipe.config.experiment import Experiment
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.training.measurement.step_trace import TracedStep
from skippipe.training.recovery.plans.better_plans import READINGS, BetterPlans, BetterPlanSearch
from skippipe.training.recovery.plans.link_readings import TRACED, LinkReadings, packed
from skippipe_scheduler.plan.recost import NodePair

if TYPE_CHECKING:
    from skippipe.membership.epoch import Member
    from skippipe.membership.exchange import Exchange


class Replanning:
    """One process's part, from epoch to epoch; without `recovery.replan` it does nothing."""

    def __init__(self, experiment: Experiment, exchange: "Exchange") -> None:
        self._recovery, self._options = experiment.recovery, experiment.recovery.replan
        self._free_origins = experiment.pipeline.microbatches_per_origin == "auto"
        self._exchange = exchange
        self._interval = max(1, self._options.window // READINGS)
        self._after = 0
        self._search: BetterPlanSearch | None = None
        self._readings: LinkReadings | None = None
        self.link_paces: Mapping[NodePair, float] = {}
        """Time of messages over that of the plan, as it was read last; known on the first rank."""

    @property
    def found(self) -> BetterPlans | None:
        """The better plans, once there are some; they stay until the epoch ends."""
        return None if self._search is None else self._search.found

    def begin_epoch(
        self, whole: PlanSet, present: PlanSet, members: Sequence["Member"], own: "Member", after: int | None
    ) -> None:
        """Begin with the plans of all nodes and of the members, who go on behind step `after`, None at the start."""
        self.close()
        self._after, self.link_paces = after or 0, {}
        if not self._options.enabled or own.name != present.main.nodes[0]:
            return
        self._search = BetterPlanSearch(
            whole, present, self._options, free_origins=self._free_origins, after_change=after is not None
        )
        self._readings = LinkReadings(present.main, members, self._fetch)

    def observe(self, step: int, paces: Sequence[float], traced: TracedStep | None) -> None:
        """Take from a step how long tasks have taken on each rank, over what was planned; 0 where it had none.

        `traced` is the newest step of which this process knows its messages. All members call this between two steps.
        """
        if not self._options.enabled or step <= self._after:
            return
        if step % self._interval == 0 and traced is not None and traced.step > self._after:
            self._exchange.offer(TRACED, packed(traced))
        if self._search is not None and self._readings is not None:
            link_paces = self._readings.take()
            self.link_paces = {**self.link_paces, **(link_paces or {})}  # a reading may lack some links
            self._search.observe(step, paces, link_paces)
            if step % self._interval == 1 % self._interval:  # all have offered theirs before they took this step
                self._readings.begin()

    def close(self) -> None:
        """Search and read no more."""
        if self._search is not None:
            self._search.close()
        if self._readings is not None:
            self._readings.close()
        self._search = self._readings = None

    def _fetch(self, member: "Member", name: str) -> bytes | None:
        from skippipe.membership.download import Source

        readings, silence_s = self._readings, self._recovery.silence_s
        place = Source(member.host, member.data_port)
        return self._exchange.fetch(place, name, silence_s, lambda: self._readings is readings)
