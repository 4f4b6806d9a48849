"""The problem as the bounds see it: the nodes of each class of stages, their costs, and the ways through the classes.

Where the placement is fixed, a class is a stage. Where it is free, or the rules allow too many sequences, there are
two: class 0 are the origins, class 1 all other stages; then any node may follow any other (a relaxation).
"""

from functools import cached_property

import numpy as np
import numpy.typing as npt

from skippipe_scheduler.bounds.automaton import Automaton, any_sequence, legal_sequences
from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.slots.least_reductions import least_reductions_s
from skippipe_scheduler.slots.near_nodes import least_anywhere_s
from skippipe_scheduler.slots.slot_model import SlotModel

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]


class Network:
    """Costs by class and node. Bounds of a free placement must hold for every choice of origins among `origins`."""

    def __init__(self, problem: Problem) -> None:
        costs, names = problem.costs, problem.nodes
        self.problem = problem
        self.slot_model = SlotModel(problem)
        self.placement = self.slot_model.given_placement()
        self.fixed = self.placement is not None
        legal = legal_sequences(problem.rules) if self.fixed else None
        self.by_stage = legal is not None
        self.automaton: Automaton = legal or any_sequence(problem.rules)
        self.nodes_of = self._nodes_of_classes()
        self.origins = self.nodes_of[0]
        self.forward_s = self._weighted({name: costs.forward_s[name] for name in names})
        self.backward_s = self._weighted({name: costs.backward_s[name] for name in names})
        self.work_s = [ahead + back for ahead, back in zip(self.forward_s, self.backward_s, strict=True)]
        self.loss_s = np.array([costs.loss_s[name] for name in names])
        self.memory = np.array([costs.memory[name] for name in names])
        self.overhead_s = costs.task_overhead_s
        self.one_way_s: Matrix = self.slot_model.transfer_s
        self.both_ways_s = self.one_way_s + self.one_way_s.T
        self.reduce_s = self._reduce_s()
        self.visit_s: Matrix = np.array(self.work_s) + 2 * self.overhead_s
        self.visit_s[0] += self.loss_s + self.overhead_s

    @property
    def num_microbatches(self) -> int:
        """Microbatches of one iteration."""
        return self.problem.num_microbatches

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Microbatches of each origin; only where the problem says it."""
        return self.problem.microbatches_of_origins()

    @property
    def least_count(self) -> int:
        """Fewest microbatches that any origin starts."""
        return 0 if self.problem.free_origins else min(self.counts)

    @property
    def greatest_count(self) -> int:
        """Most microbatches that any origin starts."""
        return self.num_microbatches if self.problem.free_origins else max(self.counts)

    @cached_property
    def steps(self) -> float:
        """About how many additions a shortest walk for every origin takes."""
        automaton = self.automaton
        size = [len(nodes) for nodes in self.nodes_of]
        pairs = sum(
            size[automaton.stage[state]] * size[automaton.stage[successor]]
            for state, successors in enumerate(automaton.next_states)
            for successor in successors
        )
        return float(pairs * len(self.origins))

    @cached_property
    def alike(self) -> Indices:
        """The first node that each is like: exchanging the two changes no cost."""
        costs = self.problem.costs
        tables = (costs.forward_s, costs.backward_s, costs.loss_s, costs.memory)
        own = [[table[name] for table in tables] for name in self.problem.nodes]
        first = np.arange(len(own))
        for node in range(len(own)):
            for other in range(node):
                if own[node] == own[other] and self._same_links(node, other):
                    first[node] = other
                    break
        return first

    def _same_links(self, node: int, other: int) -> bool:
        exchanged = np.arange(len(self.one_way_s))
        exchanged[[node, other]] = other, node
        return bool((self.one_way_s[np.ix_(exchanged, exchanged)] == self.one_way_s).all())

    def nodes_of_stage(self, stage: int) -> Indices:
        """Return the nodes that hold the stage, or may where the placement is free."""
        if self.placement is None:
            return np.arange(len(self.problem.nodes))
        return np.array([self.placement[slot] for slot in self.slot_model.slots_of[stage]])

    def _nodes_of_classes(self) -> list[Indices]:
        if not self.fixed:
            return [self.nodes_of_stage(0), self.nodes_of_stage(1)]
        stages = [self.nodes_of_stage(stage) for stage in range(self.problem.num_stages)]
        return stages if self.by_stage else [stages[0], np.concatenate(stages[1:])]

    def _weighted(self, seconds: dict[str, float]) -> list[Vector]:
        """Return the task times of every node in each class, with the least weight that its stage can have there."""
        plain = np.array([seconds[name] for name in self.problem.nodes])
        weight = self.problem.stage_weight
        if self.by_stage:
            return [plain * factor for factor in weight]
        if self.placement is None:
            return [plain * weight[0], plain * min(weight[1:])]
        held = np.empty(len(plain))
        held[list(self.placement)] = [weight[stage] for stage in self.slot_model.stage_of]
        return [plain * held, plain * held]

    def _reduce_s(self) -> tuple[float, ...]:
        """Return the least gradient reduction time of each class."""
        if self.placement is not None:
            stages = least_reductions_s(self.problem, self.slot_model.stages(self.placement))
        else:
            stages = least_anywhere_s(self.slot_model)
        return stages if self.by_stage else (stages[0], min(stages[1:]))
