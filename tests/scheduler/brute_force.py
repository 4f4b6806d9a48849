"""The optimum of a tiny problem: every placement, every choice of routes, every order of every node.

Independent of the planner's search and bounds. Orders are enumerated as events in time (Giffler and Thompson's idea,
Operations Research 8, 1960, for semi-active schedules): either a task whose input is there starts, or the transfer that
has been ready longest begins. Costs should be in general position: where links are shared, transfers that become ready
at exactly the same time are taken in one order only.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations_with_replacement, pairwise, permutations, product
from typing import TypeVar

from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.problem.rules import coverage_offence, first_offence, length_offence

Route = tuple[str, ...]
Stages = tuple[tuple[str, ...], ...]
Number = TypeVar("Number", int, float)


def optimum_s(problem: Problem, known_s: float = math.inf) -> float:
    """Return the shortest iteration of any legal plan in seconds, or `known_s` where none is shorter."""
    best_s = known_s
    cases = [_Case(problem, stages, routes) for stages in placements(problem) for routes in choices(problem, stages)]
    for case in sorted(cases, key=lambda case: case.bound_s(case.root())):
        best_s = case.best_below_s(best_s)
    return best_s


def placements(problem: Problem) -> Iterator[Stages]:
    """Yield every assignment of nodes to the replicas of stages."""
    if problem.stages is not None:
        yield tuple(stage.nodes for stage in problem.stages)
        return
    ends = [sum(problem.sizes[: stage + 1]) for stage in range(problem.num_stages)]
    seen = set()
    for nodes in permutations(problem.nodes):
        stages = tuple(nodes[end - size : end] for size, end in zip(problem.sizes, ends, strict=True))
        # Replicas are alike but for how many microbatches start there and for the ring of their reduction.
        same = (frozenset(zip(stages[0], _shares(problem)[0], strict=True)), *map(frozenset, stages[1:]))
        key = (same, problem.reduce_s(stages))
        if key not in seen:
            seen.add(key)
            yield stages


def _shares(problem: Problem) -> list[tuple[int, ...]]:
    """Return how many microbatches the origins may start."""
    if not problem.free_origins:
        return [problem.microbatches_of_origins()]
    total, origins = problem.num_microbatches, problem.sizes[0]
    found = [share for share in product(range(total + 1), repeat=origins) if sum(share) == total]
    return sorted(found, key=lambda share: max(share) - min(share))


def choices(problem: Problem, stages: Stages) -> Iterator[tuple[Route, ...]]:
    """Yield every legal choice of routes; microbatches of one origin are interchangeable."""
    stage_of = {node: stage for stage, nodes in enumerate(stages) for node in nodes}
    sequences = [
        order
        for length in problem.rules.lengths
        for order in permutations(range(problem.num_stages), length)
        if first_offence(order, problem.rules) is None
    ]
    of_origin = [
        [(origin, *rest) for order in sequences for rest in product(*(stages[stage] for stage in order[1:]))]
        for origin in stages[0]
    ]
    for share in _shares(problem):
        choices = (combinations_with_replacement(of_origin[origin], count) for origin, count in enumerate(share))
        for chosen in product(*choices):
            routes = tuple(chain.from_iterable(chosen))
            visits = Counter(stage_of[node] for route in routes for node in route)
            counts = [visits[stage] for stage in range(problem.num_stages)]
            if not coverage_offence(counts, problem.rules) and not length_offence(map(len, routes), problem.rules):
                yield routes


@dataclass(frozen=True)
class _State:
    """An unfinished schedule: `done` tasks of each microbatch, and since when its next input is there, its node idle
    and a link or card free. `sent` are the transfers that wait, by when they became ready.
    """

    now_s: float
    done: tuple[int, ...]
    input_s: tuple[float, ...]
    idle_s: tuple[float, ...]
    shared_s: tuple[tuple[object, float], ...] = ()
    sent: tuple[tuple[float, int], ...] = ()
    reached_s: float = 0.0


class _Case:
    """One placement with one choice of routes. Nodes are numbered."""

    def __init__(self, problem: Problem, stages: Stages, routes: Sequence[Route]) -> None:
        self.costs = costs = problem.costs
        self.names = list(chain.from_iterable(stages))
        stage = {node: index for index, nodes in enumerate(stages) for node in nodes}
        weight = {node: problem.stage_weight[stage[node]] for node in self.names}
        reduce_s = problem.reduce_s(stages)
        self.routes = list(routes)
        self.lengths = [len(route) for route in routes]
        self.path = [[self.names.index(node) for node in (*route, route[0], *reversed(route))] for route in routes]
        self.work_s = [
            [
                *(costs.forward_s[node] * weight[node] for node in route),
                costs.loss_s[route[0]],
                *(costs.backward_s[node] * weight[node] for node in reversed(route)),
            ]
            for route in routes
        ]
        self.hop_s = [
            [*(costs.transfer_s[self.names[a]][self.names[b]] for a, b in pairwise(path)), 0.0] for path in self.path
        ]
        self.memory = [costs.memory[name] for name in self.names]
        self.reduce_s = [reduce_s[stage[name]] for name in self.names]
        self.idle_reduce_s = max(reduce_s)
        self.tail_s = [self._tails(microbatch) for microbatch in range(len(routes))]

    def _tails(self, microbatch: int) -> list[float]:
        """Return the least time from the end of each task to the end of the iteration."""
        tails: list[float] = []
        later_s = 0.0
        for step in range(2 * self.lengths[microbatch], -1, -1):
            is_backward = step > self.lengths[microbatch]
            tails.append(max(later_s, self.reduce_s[self.path[microbatch][step]] if is_backward else 0.0))
            later_s = self.work_s[microbatch][step] + tails[-1] + (self.hop_s[microbatch][step - 1] if step else 0.0)
        return tails[::-1]

    def root(self) -> _State:
        count = len(self.routes)
        return _State(0.0, (0,) * count, (0.0,) * count, (0.0,) * len(self.names), reached_s=self.idle_reduce_s)

    def best_below_s(self, limit_s: float) -> float:
        """Return the shortest iteration, or `limit_s` where none is shorter. Depth first, the best bound first."""
        seen: dict[tuple[int, ...], list[tuple[float, ...]]] = {}
        stack = [(self.bound_s(self.root()), self.root())]
        while stack:
            bound_s, state = stack.pop()
            if bound_s >= limit_s * (1 - 1e-12):
                continue
            if not state.sent and all(done > 2 * length for done, length in zip(state.done, self.lengths, strict=True)):
                limit_s = state.reached_s
            elif self.costs.contention != "none" or not _is_dominated(state, seen):
                following = [(self.bound_s(successor), successor) for successor in self.successors(state)]
                stack += sorted(following, key=lambda pair: -pair[0])
        return limit_s

    def successors(self, state: _State) -> Iterator[_State]:
        first_ready_s = state.sent[0][0] if state.sent else math.inf
        waiting = {microbatch for _, microbatch in state.sent}
        for microbatch, done in enumerate(state.done):
            if done > 2 * self.lengths[microbatch] or microbatch in waiting or self._repeats(state, microbatch):
                continue
            start_s = max(state.input_s[microbatch], state.idle_s[self.path[microbatch][done]])
            has_room = (
                done >= self.lengths[microbatch]
                or self._held(state, self.path[microbatch][done]) < self.memory[self.path[microbatch][done]]
            )
            if state.now_s <= start_s <= first_ready_s and has_room:
                yield self._start(state, microbatch, start_s)
        if state.sent:
            yield self._send(state)

    def _repeats(self, state: _State, microbatch: int) -> bool:
        """Microbatches that take the same route begin in order."""
        return state.done[microbatch] == 0 and any(
            state.done[other] == 0 for other in range(microbatch) if self.routes[other] == self.routes[microbatch]
        )

    def _held(self, state: _State, node: int) -> int:
        return sum(
            hop < done <= 2 * length - hop
            for path, length, done in zip(self.path, self.lengths, state.done, strict=True)
            for hop in range(length)
            if path[hop] == node
        )

    def _start(self, state: _State, microbatch: int, start_s: float) -> _State:
        step = state.done[microbatch]
        node, end_s = self.path[microbatch][step], start_s + self.work_s[microbatch][step]
        is_last, shared = step == 2 * self.lengths[microbatch], self.costs.contention != "none"
        reduced_s = end_s + (self.reduce_s[node] if step > self.lengths[microbatch] else 0.0)
        return replace(
            state,
            now_s=start_s,
            done=_with(state.done, microbatch, step + 1),
            input_s=_with(state.input_s, microbatch, end_s + (0.0 if shared else self.hop_s[microbatch][step])),
            idle_s=_with(state.idle_s, node, end_s + self.costs.task_overhead_s),
            sent=state.sent if is_last or not shared else tuple(sorted([*state.sent, (end_s, microbatch)])),
            reached_s=max(state.reached_s, reduced_s),
        )

    def _send(self, state: _State) -> _State:
        """Begin the transfer that has been ready longest, once all that it needs is free."""
        ready_s, microbatch = state.sent[0]
        step = state.done[microbatch]
        source, sink = self.names[self.path[microbatch][step - 1]], self.names[self.path[microbatch][step]]
        cards = [("out", source), ("in", sink)] if self.costs.contention == "node" else []
        needs = [(source, sink, "link"), *cards]
        free_s = dict(state.shared_s)
        start_s = max(ready_s, *(free_s.get(need, 0.0) for need in needs))
        free_s |= dict.fromkeys(needs, start_s + self.costs.occupancy_s(source, sink))
        return replace(
            state,
            now_s=max(state.now_s, ready_s),
            input_s=_with(state.input_s, microbatch, start_s + self.hop_s[microbatch][step - 1]),
            shared_s=tuple(free_s.items()),
            sent=state.sent[1:],
        )

    def bound_s(self, state: _State) -> float:
        """Return a time that no completion beats: each microbatch alone, each node with its remaining work alone."""
        bound_s, count = state.reached_s, len(self.names)
        begin_s, tail_s, work_s = [math.inf] * count, [math.inf] * count, [0.0] * count
        waiting = {microbatch for _, microbatch in state.sent}
        for microbatch, done in enumerate(state.done):
            at_s = state.input_s[microbatch] + (self.hop_s[microbatch][done - 1] if microbatch in waiting else 0.0)
            for step in range(done, 2 * self.lengths[microbatch] + 1):
                node = self.path[microbatch][step]
                at_s = max(at_s, state.idle_s[node], state.now_s)
                begin_s[node] = min(begin_s[node], at_s)
                tail_s[node] = min(tail_s[node], self.tail_s[microbatch][step])
                work_s[node] += self.work_s[microbatch][step] + self.costs.task_overhead_s
                bound_s = max(bound_s, at_s + self.work_s[microbatch][step] + self.tail_s[microbatch][step])
                at_s += self.work_s[microbatch][step] + self.hop_s[microbatch][step]
        ends = zip(begin_s, work_s, tail_s, strict=True)
        busy_s = (begin + work - self.costs.task_overhead_s + tail for begin, work, tail in ends if work)
        return max(bound_s, *busy_s, 0.0)


def _is_dominated(state: _State, seen: dict[tuple[int, ...], list[tuple[float, ...]]]) -> bool:
    """Whether an equally far schedule was no later anywhere. (Not so where links are shared: sooner may block more.)"""
    times = (state.now_s, state.reached_s, *state.input_s, *state.idle_s)
    others = seen.setdefault(state.done, [])
    if any(all(a <= b for a, b in zip(other, times, strict=True)) for other in others):
        return True
    others[:] = [known for known in others if any(a < b for a, b in zip(known, times, strict=True))]
    others.append(times)
    return False


def _with(row: tuple[Number, ...], index: int, value: Number) -> tuple[Number, ...]:
    return row[:index] + (value,) + row[index + 1 :]  # noqa: RUF005  # a constrained type does not unpack
