"""Lower bounds of the iteration time of a problem as posed: over all routes and, where it is free, all
placements.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from skippipe_scheduler.problem import Problem
from skippipe_scheduler.slots import Layout

Matrix = npt.NDArray[np.float64]
_SLACK = 1 - 1e-9
"""Bounds are lowered by this much, so that rounding never makes one exceed the true time."""


def lower_bounds(problem: Problem, budget_s: float = 2.0) -> dict[str, float]:
    """Return named lower bounds in seconds; the largest is the best known."""
    costs = _NodeCosts(problem)
    return {
        "node work": _node_work_s(costs) * _SLACK,
        "round trip": _over_origins(costs, lambda node, count: costs.trip_s[node]) * _SLACK,
        "origin waves": _over_origins(costs, costs.waves_s) * _SLACK,
    }


class _NodeCosts:
    """Costs by node, and for a fixed placement the stage of each node."""

    def __init__(self, problem: Problem) -> None:
        costs, names = problem.costs, problem.nodes
        self.problem = problem
        self.layout = Layout(problem)
        self.placement = self.layout.given_placement()
        self.counts = problem.microbatches_of_origins()
        self.forward_s = np.array([costs.forward_s[n] for n in names])
        self.work_s = self.forward_s + np.array([costs.backward_s[n] for n in names])
        self.loss_s = np.array([costs.loss_s[n] for n in names])
        self.memory = [costs.memory[n] for n in names]
        self.one_way_s: Matrix = np.array([[0.0 if a == b else costs.transfer_s[a][b] for b in names] for a in names])
        self.hop_s: Matrix = self.one_way_s + self.one_way_s.T
        np.fill_diagonal(self.hop_s, np.inf)
        self.trip_s = self._trips_s()

    def allowed(self, stage: int) -> npt.NDArray[np.intp]:
        """Return the nodes that can hold `stage`."""
        if self.placement is None:
            return np.arange(len(self.problem.nodes))
        return np.array([self.placement[slot] for slot in self.layout.slots_of[stage]])

    def _trips_s(self) -> list[float]:
        """Return for each node the shortest round trip if it is an origin, by dynamic programming over
        sequences.

        Forward and backward of a hop add up to one symmetric length, so a round trip is a closed walk.
        """
        weight = self.problem.stage_weight
        sequences = set(self.layout.sequences)
        if self.placement is None:
            by_weight = {tuple(weight[stage] for stage in sequence): sequence for sequence in sequences}
            sequences = set(by_weight.values())
        best: Matrix = np.full(len(self.problem.nodes), np.inf)
        for sequence in sequences:
            origins = self.allowed(0)
            length = np.full((len(origins), len(self.problem.nodes)), np.inf)
            length[np.arange(len(origins)), origins] = self.work_s[origins] * weight[0] + self.loss_s[origins]
            for stage in sequence[1:]:
                here = self.allowed(stage)
                longer = np.full_like(length, np.inf)
                reached = (length[:, :, None] + self.hop_s[None, :, here]).min(axis=1)
                longer[:, here] = reached + self.work_s[here] * weight[stage]
                length = longer
            closed = (length + self.hop_s[origins]).min(axis=1)
            best[origins] = np.minimum(best[origins], closed)
        return [float(trip_s) for trip_s in best]

    def waves_s(self, node: int, count: int) -> float:
        """Return the least time for an origin with `count` microbatches.

        Held intervals colour with `memory` colours; one colour has ceil(count / memory) of them, one after
        another.
        """
        waves = math.ceil(count / self.memory[node])
        return waves * self.trip_s[node] + (waves - 1) * self.problem.costs.task_overhead_s


def _over_origins(costs: _NodeCosts, bound_s: Callable[[int, int], float]) -> float:
    """Return the largest bound over the origins; with a free placement, of the best possible set of
    origins.
    """
    if costs.placement is not None:
        busy = [(slot, count) for slot, count in enumerate(costs.counts) if count]
        return max(bound_s(costs.placement[slot], count) for slot, count in busy)
    used = [count for count in costs.counts if count]
    least = min(used)
    ranked = sorted(bound_s(node, least) for node in range(len(costs.problem.nodes)))
    return ranked[len(used) - 1]


def _node_work_s(costs: _NodeCosts) -> float:
    """Return the least time in which the replicas of some stage can do that stage's work."""
    low, _ = costs.layout.coverage
    overhead_s = costs.problem.costs.task_overhead_s
    best_s = 0.0
    for stage, size in enumerate(costs.problem.sizes):
        weight = costs.problem.stage_weight[stage]
        nodes = costs.allowed(stage)
        if stage == 0:
            each_s = costs.work_s[nodes] * weight + costs.loss_s[nodes] + 3 * overhead_s
            fixed = costs.placement is not None
            shares = zip(costs.counts, each_s if fixed else [each_s.min()] * size, strict=True)
            best_s = max(best_s, *(count * float(taken_s) - overhead_s for count, taken_s in shares), 0.0)
        elif low and costs.problem.rules.uniform_coverage:
            each_s = np.sort(costs.work_s[nodes] * weight + 2 * overhead_s)[:size]
            best_s = max(best_s, _least_time_s([float(e) for e in each_s], low) - overhead_s + _ends_s(costs, nodes))
    return best_s


def _ends_s(costs: _NodeCosts, nodes: npt.NDArray[np.intp]) -> float:
    """Return the least time before a stage's first task and after its last (at an origin and on the way)."""
    weight = costs.problem.stage_weight[0]
    origins = costs.allowed(0)
    away = costs.one_way_s + np.where(np.eye(len(costs.one_way_s)) > 0, np.inf, 0.0)
    forward_s = float(costs.forward_s[origins].min()) * weight
    backward_s = float((costs.work_s - costs.forward_s)[origins].min()) * weight
    return forward_s + backward_s + float(away[:, nodes].min()) + float(away[nodes].min())


def _least_time_s(each_s: list[float], count: int) -> float:
    """Return when machines that take `each_s` per item have together done `count` items."""
    done = [0] * len(each_s)
    for _ in range(count):
        machine = min(range(len(each_s)), key=lambda index: (done[index] + 1) * each_s[index])
        done[machine] += 1
    return max(number * taken_s for number, taken_s in zip(done, each_s, strict=True))
