"""Placements to start from: put nodes into slots so that a balanced, network-blind set of routes becomes
cheap.

With the routes fixed by slot, choosing nodes is a quadratic assignment problem. It is searched by
exchanging two nodes, under annealing, with the bounds of the count model (work, Little) as a cheap
surrogate of the iteration.
"""

import math
import random
from collections import Counter

from skippipe_scheduler.budget import Budget
from skippipe_scheduler.routes import balanced_routes
from skippipe_scheduler.slots import Layout, Placement, SlotRoute

_STEPS = 3000


def propose_placements(
    layout: Layout, count: int, seed: int, budget: Budget
) -> list[tuple[Placement, list[SlotRoute]]]:
    """Return up to `count` placements with the routes they were chosen for, best surrogate first.

    Without a clock every start takes a fixed number of steps, so the result depends on `seed` alone.
    """
    found: dict[Placement, tuple[float, list[SlotRoute]]] = {}
    for start in range(count):
        routes = list(balanced_routes(layout, seed + start))
        rng = random.Random(f"{seed} {start}")
        value_s, placement = _anneal(layout, routes, rng, budget)
        if placement not in found or value_s < found[placement][0]:
            found[placement] = (value_s, routes)
        if budget.exhausted:
            break
    ranked = sorted(found.items(), key=lambda item: (item[1][0], item[0]))
    return [(placement, routes) for placement, (_, routes) in ranked]


def _anneal(layout: Layout, routes: list[SlotRoute], rng: random.Random, budget: Budget) -> tuple[float, Placement]:
    surrogate = Surrogate(layout, routes)
    nodes = list(range(len(layout.stage_of)))
    rng.shuffle(nodes)
    value_s = surrogate(nodes)
    best, best_s = tuple(nodes), value_s
    for step in range(_STEPS):
        if step % 64 == 0 and not budget.repeatable and budget.exhausted:
            break
        left, right = rng.sample(range(len(nodes)), 2)
        nodes[left], nodes[right] = nodes[right], nodes[left]
        trial_s = surrogate(nodes)
        heat_s = 0.1 * best_s * (1 - step / _STEPS) ** 2
        if trial_s <= value_s or rng.random() < math.exp((value_s - trial_s) / max(heat_s, 1e-12)):
            value_s = trial_s
            if value_s < best_s:
                best, best_s = tuple(nodes), value_s
        else:
            nodes[left], nodes[right] = nodes[right], nodes[left]
    return best_s, best


class Surrogate:
    """Seconds that an iteration with the given routes is likely to need under a placement; cheap, not
    exact.
    """

    def __init__(self, layout: Layout, routes: list[SlotRoute]) -> None:
        problem, costs = layout.problem, layout.problem.costs
        names = problem.nodes
        self.layout = layout
        self.groups = sorted(Counter(routes).items())
        self.work_s = [costs.forward_s[n] + costs.backward_s[n] for n in names]
        self.loss_s = [costs.loss_s[n] for n in names]
        self.memory = [costs.memory[n] for n in names]
        self.overhead_s = costs.task_overhead_s
        self.hop_s = [
            [0.0 if a == b else costs.transfer_s[a][b] + costs.transfer_s[b][a] for b in names] for a in names
        ]
        self.weight = [problem.stage_weight[stage] for stage in layout.stage_of]
        self.reduces = problem.costs.reduce_s is None and problem.stage_bytes is not None

    def __call__(self, nodes: list[int]) -> float:
        """Return the surrogate with node `nodes[slot]` in each slot."""
        held_s, busy_s = [0.0] * len(nodes), [0.0] * len(nodes)
        trips_s, total, weight, work_s = 0.0, 0, self.weight, self.work_s
        for route, count in self.groups:
            origin = nodes[route[0]]
            rest_s = self.loss_s[origin] + self.hop_s[nodes[route[-1]]][origin]
            after = -1
            for slot in reversed(route):
                node = nodes[slot]
                taken_s = work_s[node] * weight[slot]
                rest_s += taken_s + (self.hop_s[node][after] if after >= 0 else 0.0)
                held_s[slot] += count * rest_s
                busy_s[slot] += count * (taken_s + 2 * self.overhead_s)
                after = node
            trips_s += count * rest_s
            total += count
        peak_s = max(max(h / self.memory[n], b) for h, b, n in zip(held_s, busy_s, nodes, strict=True))
        value_s = peak_s + 0.2 * trips_s / total
        if self.reduces:
            value_s += 0.5 * max(self.layout.problem.reduce_s(self.layout.stages(tuple(nodes))))
        return value_s
