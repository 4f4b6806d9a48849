"""What is known when nodes are lost, for the member that decides how all go on."""

from collections.abc import Mapping
from typing import NamedTuple

from skippipe.planning.moved_nodes import MovedNodes
from skippipe.runtime.plans.plan_set import PlanSet


class Situation(NamedTuple):
    """Who is left, and what is left of the stages."""

    plans: PlanSet
    """Those of all nodes, at the places that they have now."""
    members: tuple[str, ...]
    standing: frozenset[str]
    """Members that have the state of their stage."""
    copies: Mapping[int, Mapping[str, int]]
    """The members that have a copy of a stage, by stage, each with the step behind which the copy was made."""
    saved_stages: frozenset[int]
    """The stages whose part of the newest checkpoint is on disks that are left."""
    moves: MovedNodes
    limit_s: float
    """For how long nodes are compared where several could take a stage over."""
    without_text: frozenset[str] = frozenset()
    """Members that cannot begin microbatches, as their hosts have not the text."""

    @property
    def lost(self) -> list[str]:
        """The nodes that are not there."""
        return [node for node in self.plans.main.nodes if node not in self.members]

    @property
    def lost_stages(self) -> list[int]:
        """The stages of which no node is there."""
        stages = enumerate(self.plans.main.stages)
        return [index for index, stage in stages if not set(stage.nodes).intersection(self.members)]

    def standing_nodes(self, stage: int) -> list[str]:
        """Return the members that have the state of a stage."""
        return [node for node in self.plans.main.stages[stage].nodes if node in self.standing]

    def moved(self, plans: PlanSet) -> "Situation":
        """Return the situation at other places; who has another one there has not the state of its stage."""
        before, after = self.plans.main.stage_of, plans.main.stage_of
        kept = frozenset(node for node in self.standing if before[node] == after[node])
        return self._replace(plans=plans, standing=kept)
