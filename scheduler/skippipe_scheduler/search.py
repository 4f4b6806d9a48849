"""Large neighbourhood search over routes, order and, where it is free, placement, with annealing.

A step takes a few microbatches out of the timeline, changes routes or exchanges two nodes, and inserts them
again. The score is the exact iteration time plus small weights on the origins' last finish and the mean
finish, because the iteration time alone is a plateau.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from skippipe_scheduler.budget import Budget
from skippipe_scheduler.moves import Moves
from skippipe_scheduler.order import Timeline, build, fits_memory, retime
from skippipe_scheduler.slots import Layout, Placement, SlotCosts, SlotRoute

_ORIGIN_WEIGHT = 0.03
_MEAN_WEIGHT = 0.03
_HEAT = 0.012
_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Longest waits of a task for its node, in mean task times."""

Judge = Callable[["State"], float]
"""Exact iteration seconds of a state."""


@dataclass(frozen=True)
class State:
    """A complete schedule and its score."""

    costs: SlotCosts
    routes: tuple[SlotRoute, ...]
    timeline: Timeline
    iteration_s: float
    score: float


@dataclass(frozen=True)
class Progress:
    """What a search reports now and then."""

    elapsed_s: float
    evaluations: int
    iteration_s: float
    lower_bound_s: float


class Search:
    """Improves states of one layout; all randomness comes from `seed`."""

    def __init__(self, layout: Layout, seed: int, judge: Judge | None = None) -> None:
        self.layout = layout
        self.rng = random.Random(seed)
        self.moves = Moves(layout)
        self.judge = judge
        self.free = layout.given_placement() is None

    def start(self, placement: Placement, routes: tuple[SlotRoute, ...]) -> State:
        """Return the best of a few insertion sequences for the given placement and routes."""
        costs = SlotCosts(self.layout, placement)
        longest = sorted(range(len(routes)), key=lambda one: -costs.chain(routes[one]).round_trip_s)
        turn: dict[int, int] = {}
        turns = []
        for origin in self.layout.origins:
            turns.append(turn.get(origin, 0))
            turn[origin] = turns[-1] + 1
        waves = sorted(longest, key=lambda one: turns[one])
        states = [
            self.score(build(costs, routes, sequence, wait_s), routes)
            for sequence in (waves, longest)
            for wait_s in self._waits_s(costs)[1::2]
        ]
        return min(states, key=lambda state: state.score)

    def improve(
        self, state: State, budget: Budget, goal_s: float = 0.0, report: Callable[[State], None] | None = None
    ) -> State:
        """Search until `budget` is spent or the iteration takes at most `goal_s`; return the best state
        seen.
        """
        best = current = state
        while not budget.exhausted and best.iteration_s > goal_s * (1 + 1e-9) + 1e-9:
            budget.spent += 1
            candidate = self._neighbour(current)
            if candidate is None:
                continue
            heat = _HEAT * best.score * (1 - budget.fraction) ** 2 + 1e-12
            if candidate.score <= current.score - heat * math.log(1 - self.rng.random()):
                current = candidate
                if current.score < best.score - 1e-12:
                    best = current
                    if report:
                        report(best)
            elif budget.spent % 400 == 0:
                current = best
        return best

    def _neighbour(self, state: State) -> State | None:
        rng, costs = self.rng, state.costs
        routes = list(state.routes)
        chosen = self._choose(state)
        action = rng.random()
        if self.free and action < 0.3:
            exchanged = self._exchange_nodes(state)
            if exchanged is None:
                return None
            costs, touched = exchanged
            users = [one for one, route in enumerate(routes) if touched.intersection(route)]
            if rng.random() < 0.3:
                timeline = retime(costs, routes, state.timeline.starts)
                return self.score(timeline, tuple(routes)) if fits_memory(timeline) else None
            chosen = rng.sample(users, min(len(users), rng.randint(2, 8))) if users else chosen
        elif action < 0.75:
            for _ in range(rng.choice((1, 1, 2))):
                routes = self.moves.apply(routes, chosen, rng)
        return self._reinsert(costs, routes, state, chosen)

    def _reinsert(self, costs: SlotCosts, routes: list[SlotRoute], state: State, chosen: list[int]) -> State | None:
        out = set(chosen)
        out.update(one for one, route in enumerate(routes) if route != state.routes[one])
        sequence = sorted(out)
        if costs is state.costs:
            timeline = state.timeline.without(state.routes, sequence)
        else:
            kept = [[] if one in out else row for one, row in enumerate(state.timeline.starts)]
            timeline = retime(costs, routes, kept)
            if not fits_memory(timeline):
                return None
        self.rng.shuffle(sequence)
        if self.rng.random() < 0.4:
            sequence.sort(key=lambda one: -costs.chain(routes[one]).round_trip_s)
        wait_s = self.rng.choice(self._waits_s(costs))
        for one in sequence:
            timeline.insert(one, routes[one], wait_s)
        return self.score(retime(costs, routes, timeline.starts), tuple(routes))

    def _choose(self, state: State) -> list[int]:
        """Return 2 to 6 microbatches: late ones, of one origin, that share a slot, or any."""
        rng, total = self.rng, len(state.routes)
        count = min(total, rng.randint(2, 6))
        way = rng.random()
        pool = list(range(total))
        if way < 0.35:
            late = sorted(pool, key=lambda one: -state.timeline.starts[one][-1])[: count + 2]
            half = min(len(late), (count + 1) // 2)
            return sorted({*rng.sample(late, half), *rng.sample(pool, count - half)})
        if way < 0.55:
            origin = rng.choice(state.routes)[0]
            pool = [one for one in pool if state.routes[one][0] == origin]
        elif way < 0.8:
            slot = rng.choice(rng.choice(state.routes))
            pool = [one for one in pool if slot in state.routes[one]]
        return rng.sample(pool, min(count, len(pool)))

    def _exchange_nodes(self, state: State) -> tuple[SlotCosts, set[int]] | None:
        left, right = self.rng.sample(range(len(state.costs.placement)), 2)
        nodes = list(state.costs.placement)
        nodes[left], nodes[right] = nodes[right], nodes[left]
        return SlotCosts(self.layout, tuple(nodes)), {left, right}

    def _waits_s(self, costs: SlotCosts) -> tuple[float, ...]:
        mean_s = sum(costs.backward_s) / len(costs.backward_s)
        return tuple(wait * mean_s for wait in _WAITS_S)

    def score(self, timeline: Timeline, routes: tuple[SlotRoute, ...]) -> State:
        """Score a complete timeline."""
        costs = timeline.costs
        ends = [row[-1] + costs.backward_s[route[0]] for row, route in zip(timeline.starts, routes, strict=True)]
        iteration_s = max(ends)
        if any(costs.reduce_s):
            for slot, stage in enumerate(self.layout.stage_of):
                last_s = max((end_s for _, end_s in timeline.held[slot]), default=0.0)
                iteration_s = max(iteration_s, last_s + costs.reduce_s[stage])
        last: dict[int, float] = {}
        for end_s, route in zip(ends, routes, strict=True):
            last[route[0]] = max(last.get(route[0], 0.0), end_s)
        state = State(costs, routes, timeline, iteration_s, 0.0)
        if self.judge is not None:
            iteration_s = self.judge(state)
        extra = _ORIGIN_WEIGHT * sum(last.values()) / len(last) + _MEAN_WEIGHT * sum(ends) / len(ends)
        return State(costs, routes, timeline, iteration_s, iteration_s + extra)
