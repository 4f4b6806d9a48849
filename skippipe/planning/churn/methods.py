"""Five ways to live with losses: ours and those that it is compared with, each with what it assumes."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Literal

from skippipe.planning.churn.churn_costs import BYTES_PER_PARAMETER, ChurnCosts
from skippipe.planning.churn.surviving_paces import SurvivingPaces
from skippipe_scheduler.options import LostStage

Cause = Literal[
    "detection",
    "agreement",
    "planning",
    "groups",
    "state transfer",
    "interrupted work",
    "work since a checkpoint",
    "fewer nodes",
    "redundant work",
    "checkpoints",
    "restarts",
    "rebuilding",
    "waiting",
]
"""Why time is not useful: the first five before training goes on, the next two for work that is done again."""
GoesBackTo = Literal["this instant", "step", "checkpoint"]
"""Where training goes on after a loss: where it was, at the beginning of the step, or of the last checkpoint."""
REDUNDANT_FACTOR = 151.04 / 91.35
"""Iterations with redundant computation take this much longer: measured over slow links by CheckFree (table 2)."""


@dataclass(frozen=True)
class Aftermath:
    """What a loss leads to before training goes on."""

    pauses: Mapping[Cause, float]
    back_to: GoesBackTo
    changed_stages: int = 0
    """Stages that go on with other weights than they had: older ones, or made up from other stages."""


@dataclass(frozen=True)
class RecoveryMethod(ABC):
    """What the replay asks of a method; the subclasses say how it is answered."""

    paces: SurvivingPaces
    costs: ChurnCosts
    checkpoint_interval_s: float
    """Seconds of training between two checkpoints."""
    parameters: float = 0.0
    """Of the whole model, spread over its layers, for the time of state transfers; 0 for none."""
    name: str = ""
    slowdown: float = 1.0
    """Factor on every iteration."""
    joins_at_checkpoints: bool = False
    """Whether a node that is back waits for the next checkpoint instead of the end of the step."""

    @abstractmethod
    def pace_s(self, members: Set[str]) -> float | None:
        """Return the seconds of an iteration on these nodes, slowdown aside; None where they cannot go on."""

    @abstractmethod
    def after_loss(self, members: Set[str], lost: Set[str]) -> Aftermath:
        """Return what follows when some of the members are lost."""

    def prepare_s(self, node: str, members: Set[str]) -> float:
        """Return how long a node that is back gets ready while the members train."""
        return 0.0

    @abstractmethod
    def join_pauses(self, joining: Set[str], members: Set[str]) -> Mapping[Cause, float]:
        """Return what all pause for when nodes that are ready join the members."""

    def transfer_s(self, node: str, members: Set[str]) -> float:
        """Return how long a node that is back takes to get its stage's weights and optimizer state, over the best link.

        From a member with the same stage, or from any member where there is none: then one of them has the copy.
        """
        plan = self.paces.plan
        stage = plan.stages[plan.stage_of[node]]
        latency_s, gbit_per_s = plan.costs.latency_s, plan.costs.gbit_per_s
        givers = [member for member in stage.nodes if member in members and member != node] or sorted(members - {node})
        if not self.parameters or not givers or latency_s is None or gbit_per_s is None:
            return 0.0
        share = (stage.layers[1] - stage.layers[0]) / plan.num_layers
        gbit = self.parameters * share * BYTES_PER_PARAMETER * 8e-9
        return min(latency_s[giver][node] + gbit / gbit_per_s[giver][node] for giver in givers)

    def lost_states(self, members: Set[str], lost: Set[str], *, copies: int) -> list[int]:
        """Return the stages whose state goes with the lost nodes: nobody else holds it.

        Beside its own nodes, so many members with the next stage (the first one again after the last) have a copy, and
        one more where it has no nodes. Copies are made anew after a loss, before the next one.
        """
        plan = self.paces.plan
        held = [[node for node in stage.nodes if node in members] for stage in plan.stages]
        gone = []
        for index, own in enumerate(held):
            beside = next(filter(None, held[index + 1 :] + held[:index]), [])
            holders = {*own, *beside[: copies + (not own) if copies else 0]}
            if holders and holders <= lost:
                gone.append(index)
        return gone


@dataclass(frozen=True)
class InRunRecovery(RecoveryMethod):
    """Ours: those left agree, plan and meet anew, and begin the interrupted step again (docs/recovery.md).

    Plans for the loss of single nodes are ready. A stage that nobody holds is left out of all routes until one of its
    nodes is back, and goes on from a copy where one node alone held it, else from the checkpoint's part. Where routes
    may not leave it out the run ends and is started again from the checkpoint. A node that is back is in at a step's
    end, and gets its state while the others do one more iteration without it.
    """

    name: str = "in the run"
    lost_stage: LostStage = "routes_around"

    def pace_s(self, members: Set[str]) -> float | None:
        """Return what the planner finds for these nodes."""
        return self.paces.iteration_s(members, self.lost_stage)

    def after_loss(self, members: Set[str], lost: Set[str]) -> Aftermath:
        """Return the protocol's parts, or a start from the checkpoint where there is no plan for those left."""
        costs = self.costs
        pauses: dict[Cause, float] = {"detection": costs.detection}
        if self.pace_s(members) is not None and self.pace_s(members - lost) is None:
            return Aftermath({**pauses, "restarts": costs.restart}, "checkpoint")
        held = [members & {*stage.nodes} for stage in self.paces.plan.stages]
        behind = sum(len(nodes) > 1 and nodes <= lost for nodes in held)
        return Aftermath({**pauses, **self._epoch_pauses(members - lost)}, "step", changed_stages=behind)

    def join_pauses(self, joining: Set[str], members: Set[str]) -> Mapping[Cause, float]:
        """Return the parts of a new epoch, and what is left of the transfers of state after an iteration.

        The members do that one without those who join, where they hold all stages of these; else all wait.
        """
        pauses = self._epoch_pauses(members | joining)
        transfer_s = max(self.transfer_s(node, members) for node in joining)
        before_s, after_s = self.pace_s(members), self.pace_s(members | joining)
        stages = self.paces.plan.stages
        held = all(members & {*stages[self.paces.plan.stage_of[node]].nodes} for node in joining)
        if not held or before_s is None or after_s is None:
            return {**pauses, "state transfer": transfer_s}
        slower_s = max(0.0, before_s - after_s)
        return {**pauses, "state transfer": max(0.0, transfer_s - before_s), "fewer nodes": slower_s}

    def _epoch_pauses(self, members: Set[str]) -> dict[Cause, float]:
        costs, missing = self.costs, len(self.paces.plan.nodes) - len(members)
        planning_s = costs.planning if missing > 1 else 0.0
        return {"agreement": costs.agreement, "planning": planning_s, "groups": costs.groups}


@dataclass(frozen=True)
class OthersMethod(RecoveryMethod):
    """What is granted to all others: the same planner, and where a stage has no node, nodes that are placed anew.

    An iteration then takes as long as in proportion to the nodes that are left, as long as there are as many as stages:
    no real placement is better by much, and none of these methods promises one.
    """

    def pace_s(self, members: Set[str]) -> float | None:
        """Return what the planner finds, or the time in proportion."""
        plan = self.paces.plan
        found_s = self.paces.iteration_s(members)
        if found_s is None and len(members) >= len(plan.stages):
            return plan.predicted.iteration_s * len(plan.nodes) / len(members)
        return found_s

    def prepare_s(self, node: str, members: Set[str]) -> float:
        """Return the transfer of state, which nobody waits for."""
        return self.transfer_s(node, members)

    def join_pauses(self, joining: Set[str], members: Set[str]) -> Mapping[Cause, float]:
        """Return new connections."""
        return {"groups": self.costs.groups}


@dataclass(frozen=True)
class CheckpointRestart(OthersMethod):
    """All processes end with any of them, are started again on the nodes there are, and begin from the checkpoint.

    As torchrun does with a range of nodes. Nodes that are back fetch their part of the checkpoint while the others
    train, and are taken in by a restart right after the next checkpoint, when nothing is lost by it.
    """

    name: str = "checkpoint-restart"
    joins_at_checkpoints: bool = True

    def after_loss(self, members: Set[str], lost: Set[str]) -> Aftermath:
        """Return the restart from the last checkpoint."""
        return Aftermath({"detection": self.costs.detection, "restarts": self.costs.restart}, "checkpoint")

    def join_pauses(self, joining: Set[str], members: Set[str]) -> Mapping[Cause, float]:
        """Return a restart."""
        return {"restarts": self.costs.restart}


@dataclass(frozen=True)
class FixedSizeRestart(CheckpointRestart):
    """The same where the run needs as many nodes as it was started with: it waits for those that are lost.

    As torchrun does with a fixed number of nodes, and pipelines do that have one fixed assignment of layers to ranks.
    """

    name: str = "checkpoint-restart, all nodes"
    joins_at_checkpoints: bool = False

    def pace_s(self, members: Set[str]) -> float | None:
        """Return the undisturbed iteration where all nodes are there."""
        plan = self.paces.plan
        return plan.predicted.iteration_s if len(members) == len(plan.nodes) else None

    def after_loss(self, members: Set[str], lost: Set[str]) -> Aftermath:
        """Return the end of all processes; the restart comes with the last node that is back."""
        return Aftermath({"detection": self.costs.detection}, "checkpoint")

    def join_pauses(self, joining: Set[str], members: Set[str]) -> Mapping[Cause, float]:
        """Return a restart where nobody is missing any more."""
        return {} if self.pace_s(members | joining) is None else {"restarts": self.costs.restart}


@dataclass(frozen=True)
class RedundantComputation(OthersMethod):
    """Bamboo (Thorpe et al., NSDI 2023): each node also computes for the next of its pipeline, and stands in for it.

    After a loss nothing is done again, and only connections are made anew. A state is gone where all nodes of two
    neighbouring stages are lost at once: then the last checkpoint. The price is `REDUNDANT_FACTOR`;
    Bamboo's authors report less where pipelines have large bubbles.
    """

    name: str = "redundant computation"
    slowdown: float = REDUNDANT_FACTOR

    def after_loss(self, members: Set[str], lost: Set[str]) -> Aftermath:
        """Return the short pause, or a restart."""
        costs = self.costs
        if self.lost_states(members, lost, copies=len(members)):
            return Aftermath({"detection": costs.detection, "restarts": costs.restart}, "checkpoint")
        return Aftermath({"detection": costs.detection, "groups": costs.groups}, "this instant")


@dataclass(frozen=True)
class StageRebuilding(OthersMethod):
    """CheckFree (arXiv 2506.15461): a stage that nobody holds is the mean of its neighbours, by their gradient norms.

    Not the first stage, nor two neighbours at once: then the last checkpoint. The interrupted step is done again. What
    rebuilding costs in quality is not in the goodput: the paper has 7 to 9% more perplexity for 1.5 billion parameters.
    """

    name: str = "stage rebuilding"

    def after_loss(self, members: Set[str], lost: Set[str]) -> Aftermath:
        """Return the pause for new connections, for rebuilding, or for a restart."""
        costs, gone = self.costs, self.lost_states(members, lost, copies=0)
        if 0 in gone or any(index + 1 in gone for index in gone):
            return Aftermath({"detection": costs.detection, "restarts": costs.restart}, "checkpoint")
        pauses: dict[Cause, float] = {"detection": costs.detection, "groups": costs.groups}
        return Aftermath(
            {**pauses, **({"rebuilding": costs.rebuild} if gone else {})}, "step", changed_stages=len(gone)
        )
