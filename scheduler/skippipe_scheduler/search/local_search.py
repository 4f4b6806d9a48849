"""Large neighbourhood search over routes, order and, where it is free, placement: the compiled kernel, fed and read."""

import threading
from collections.abc import Callable, Sequence

import numpy as np

from skippipe_scheduler.budget import Budget
from skippipe_scheduler.options import Robustness
from skippipe_scheduler.search.kernel.anneal import (
    anneal,
    anneal_in_place,
    construct,
    copy_schedule,
    count_visits,
    evaluate,
    insert_sequence,
    is_better,
)
from skippipe_scheduler.search.kernel.arrays import (
    BUSY,
    CONTENTION,
    INDEX_BITS,
    REDUCTION,
    Floats,
    Instance,
    Integers,
    Schedule,
    empty_schedule,
    make_work,
)
from skippipe_scheduler.search.kernel.loads import anneal_loads
from skippipe_scheduler.search.kernel.packing import pack
from skippipe_scheduler.search.kernel.timing import retime
from skippipe_scheduler.slots.slot_model import SlotCosts, SlotModel, SlotPlacement, SlotRoute
from skippipe_scheduler.slots.solution import Solution, Starts

_HEAT = 0.012
"""Rise of the score that the search accepts at first, relative to the best."""
_SMALL_TASKS = 100
"""With fewer tasks each counts for more, so the search is hotter."""
_CHUNK_S = 0.1
_FIRST_CHUNK = 20
_REPEATABLE_CHUNK = 1000
LARGE_TASKS = 1500
"""Schedules with more tasks are changed in place."""
_PACKING_WAITS, _PACKING_CHOICES = (24.0,), 128
"""Longest waits of a task for its node, in mean backward times; microbatches of an origin to choose from."""
_FACTORS = 4096
_EXCHANGE_SHARE = 0.3
_LOAD_HEAT = 0.015
_LOAD_HEAT_ROUTES = 60
"""With more routes one changes the loads less, so the search on them is cooler."""
_LOAD_COOLING = 0.01
_LOAD_STEPS_AT_A_TIME = 500_000
"""About a second, after which it can be stopped."""


class LocalSearch:
    """Improves one schedule of a problem by slot; all randomness comes from `seed`."""

    def __init__(self, slot_model: SlotModel, seed: int, robustness: Robustness | None = None) -> None:
        self.slot_model, self.seed = slot_model, seed
        self.free = slot_model.given_placement() is None
        self.instance = make_instance(slot_model, robustness)
        self.work = make_work(self.instance, self._padded([()]), seed)
        self.width = _row_width(slot_model)
        self.scores: Floats = np.full((3, 2), np.inf)
        self.large = slot_model.num_tasks > LARGE_TASKS
        self.temperature = _HEAT * max(1.0, _SMALL_TASKS / slot_model.num_tasks)
        self.steps = 0
        self.rate = _FIRST_CHUNK / _CHUNK_S

    def start(self, placement: SlotPlacement, routes: Sequence[SlotRoute]) -> Solution:
        """Begin at the best of a few insertion sequences for the given placement and routes."""
        self._allocate(placement, routes)
        if self.large:
            self._pack(placement, routes)
            if self.scores[2, 0] < np.inf:
                return self._continue()
        costs = SlotCosts(self.slot_model, placement)
        trips_s = np.array([costs.chain(route).round_trip_s for route in routes])
        turn: dict[int, int] = {}
        turns = [turn.setdefault(route[0], 0) for route in routes]
        for index, route in enumerate(routes):
            turns[index] = turn[route[0]]
            turn[route[0]] += 1
        waves = np.lexsort((-trips_s, np.array(turns)))
        waits_s = np.array([1.0, 4.0]) * np.mean(self.instance.node_s[1])
        for sequence in (waves, np.argsort(-trips_s, kind="stable")):
            for wait_s in waits_s:
                if construct(self.instance, self.candidate, self.work, sequence, float(wait_s)):
                    self._keep_better()
        return self._continue()

    def _pack(self, placement: SlotPlacement, routes: Sequence[SlotRoute]) -> None:
        """Try schedules in which the origin with the longest work left goes first, with what then fits best."""
        costs = SlotCosts(self.slot_model, placement)
        trips_s = np.array([costs.chain(route).round_trip_s for route in routes])
        origins = np.array([route[0] for route in routes])
        shuffled = np.random.default_rng(self.seed).permutation(len(routes))
        rows = [shuffled[origins[shuffled] == origin] for origin in range(len(self.slot_model.slots_of[0]))]
        members = np.full((len(rows), max(len(row) for row in rows)), -1)
        left_s = np.zeros(len(routes))
        for origin, row in enumerate(rows):
            members[origin, : len(row)] = row
            left_s[row] = trips_s[row][::-1].cumsum()[::-1] / costs.memory[origin]
        turns = origins[np.argsort(-left_s, kind="stable")]
        for factor in _PACKING_WAITS:
            wait_s = factor * float(np.mean(self.instance.node_s[1]))
            if pack(self.instance, self.candidate, self.work, turns, members.copy(), wait_s, _PACKING_CHOICES):
                self._keep_better()

    def balance_loads(
        self,
        placement: SlotPlacement,
        routes: Sequence[SlotRoute],
        steps: int,
        *,
        exchange: bool = True,
        stop: threading.Event | None = None,
    ) -> tuple[SlotPlacement, list[SlotRoute]]:
        """Return a placement and routes with lighter loads, to `start` from (`skippipe_scheduler.search.kernel.loads`).

        Where the placement is free, nodes are exchanged too if `exchange`. `stop` ends it early.
        """
        padded, lengths = self._padded(routes), np.array([len(route) for route in routes])
        changed = empty_schedule(np.array(placement), padded, lengths, 1)
        loads = np.zeros((4, max(4, len(placement))))
        share = _EXCHANGE_SHARE / (1 + len(routes) / 100) if self.free and exchange else 0.0
        temperature = _LOAD_HEAT * min(1.0, _LOAD_HEAT_ROUTES / len(routes)) ** 2
        parts = max(1, steps // _LOAD_STEPS_AT_A_TIME)
        cooling = _LOAD_COOLING ** (1 / parts)
        for part in range(parts):
            if stop is not None and stop.is_set():
                break
            cooled = temperature * cooling**part
            anneal_loads(self.instance, changed, self.work, loads, steps // parts, cooled, cooling, share)
        found = zip(changed.routes.tolist(), changed.lengths.tolist(), strict=True)
        return tuple(changed.placement.tolist()), [tuple(row[:length]) for row, length in found]

    def resume(self, solution: Solution) -> Solution:
        """Begin at a given solution, whose order is kept and timed anew."""
        self._allocate(solution.placement, solution.routes)
        fill(self.candidate, solution.starts)
        if retime(self.instance, self.candidate, self.work.queue, -1):
            self._keep_better()
        return self._continue()

    def repair(self, solution: Solution) -> Solution:
        """Begin at a solution in which some microbatches have no starts: they are inserted, the rest keep their order.

        Where that order breaks a rule by now, all are inserted anew.
        """
        missing = [m for m, row in enumerate(solution.starts) if not row]
        self._allocate(solution.placement, solution.routes)
        fill(self.candidate, solution.starts)
        retime(self.instance, self.candidate, self.work.queue, -1)
        wait_s = 2.0 * float(np.mean(self.instance.node_s[1]))
        if insert_sequence(self.instance, self.candidate, self.work, np.array(missing, np.int64), wait_s):
            self._keep_better()
            return self._continue()
        return self.start(solution.placement, solution.routes)

    def greedy_insert(self, solution: Solution) -> Solution:
        """Begin at the routes of a solution, its microbatches inserted in the sequence of their starts."""
        self._allocate(solution.placement, solution.routes)
        sequence = np.argsort([row[0] for row in solution.starts], kind="stable")
        for factor in (1, 2, 4, 8, 16, 32):
            wait_s = factor * float(self.instance.node_s[1].max())
            if construct(self.instance, self.candidate, self.work, sequence, wait_s):
                self._keep_better()
        return self._continue()

    def improve(
        self,
        budget: Budget,
        goal_s: float = 0.0,
        report: Callable[[Solution], None] | None = None,
        temperature: float = 1.0,
    ) -> Solution:
        """Anneal until the budget is spent or an iteration takes at most `goal_s`.

        The temperature falls from `temperature` times the usual one to nothing. `report` gets every better solution.
        """
        limit_s = goal_s * (1 + 1e-9) + 1e-9
        while not budget.exhausted and self.scores[2, 0] > limit_s:
            before = budget.fraction
            chunk = self._chunk(budget)
            reached = self.scores[2, 0]
            until = min(1.0, before + self._share(budget, chunk))
            temperature_s = temperature * self.temperature * self.scores[2, 1]
            spent = self._anneal(chunk, temperature_s * (1 - before) ** 2, temperature_s * (1 - until) ** 2, limit_s)
            budget.spent += max(1, spent)
            if report and self.scores[2, 0] < reached:
                report(self.best_solution())
            if spent < chunk:
                break
        return self.best_solution()

    def restart(self) -> None:
        """Continue from the best solution."""
        copy_schedule(self.current, self.best)
        count_visits(self.instance, self.current, self.work)
        self.scores[0] = self.scores[2]

    def best_solution(self) -> Solution:
        """Return the best solution so far."""
        lengths = self.best.lengths.tolist()
        return Solution(
            tuple(self.best.placement.tolist()),
            tuple(tuple(row[:length]) for row, length in zip(self.best.routes.tolist(), lengths, strict=True)),
            tuple(tuple(row[: 2 * length + 1]) for row, length in zip(self.best.starts.tolist(), lengths, strict=True)),
            float(self.scores[2, 0]),
            float(self.scores[2, 1]),
        )

    def _allocate(self, placement: SlotPlacement, routes: Sequence[SlotRoute]) -> None:
        padded, lengths = self._padded(routes), np.array([len(route) for route in routes])
        width = max(self.width, _needed_width(routes, len(placement)))
        make: Callable[[], Schedule] = lambda: empty_schedule(np.array(placement), padded, lengths, width)  # noqa: E731
        self.current, self.candidate, self.best = make(), make(), make()
        self.scores[:] = np.inf

    def _padded(self, routes: Sequence[SlotRoute]) -> Integers:
        table = np.zeros((len(self.slot_model.origins), self.slot_model.longest), np.int64)
        for row, route in zip(table, routes, strict=False):
            row[: len(route)] = route
        return table

    def _keep_better(self) -> None:
        evaluate(self.instance, self.candidate, self.work, self.scores[0])
        if is_better(self.scores):
            copy_schedule(self.best, self.candidate)
            self.scores[2] = self.scores[0]

    def _continue(self) -> Solution:
        self.restart()
        return self.best_solution()

    def _chunk(self, budget: Budget) -> int:
        if budget.evaluations is not None:
            return min(_REPEATABLE_CHUNK, budget.evaluations - budget.spent)
        left_s = budget.limit_s - budget.elapsed_s
        return max(10, int(self.rate * min(_CHUNK_S, left_s)))

    def _share(self, budget: Budget, chunk: int) -> float:
        if budget.evaluations is not None:
            return chunk / max(1, budget.evaluations)
        return chunk / self.rate / max(1e-9, budget.limit_s)

    def _anneal(self, steps: int, temperature_from_s: float, temperature_to_s: float, goal_s: float) -> int:
        clock = Budget(1.0)
        if self.large:
            spent = anneal_in_place(
                *(self.instance, self.current, self.best, self.work, self.scores),
                *(steps, temperature_from_s, temperature_to_s, goal_s),
            )
        else:
            spent = anneal(
                *(self.instance, self.current, self.candidate, self.best, self.work, self.scores),
                *(steps, temperature_from_s, temperature_to_s, self.free, goal_s),
            )
        self.rate = 0.5 * self.rate + 0.5 * max(1, spent) / max(1e-6, clock.elapsed_s)
        return spent


def make_instance(slot_model: SlotModel, robustness: Robustness | None = None) -> Instance:
    """Return the problem as arrays."""
    problem, costs, rules = slot_model.problem, slot_model.problem.costs, slot_model.problem.rules
    names = problem.nodes
    tables = (costs.forward_s, costs.backward_s, costs.loss_s)
    shared = costs.contention != "none"
    links = np.zeros((4, len(names), len(names)))
    for a, source in enumerate(names):
        for b, sink in enumerate(names):
            if a != b:
                links[0, a, b] = costs.transfer_s[source][sink]
                links[1, a, b] = costs.occupancy_s(source, sink) if shared else 0.0
                links[2, a, b] = costs.latency_s[source][sink] if costs.latency_s else 0.0
                links[3, a, b] = costs.gbit_per_s[source][sink] if costs.gbit_per_s else 1.0
    fixed_s, gbit = _reductions(slot_model)
    return Instance(
        node_s=np.array([[table[name] for name in names] for table in tables]),
        memory=np.array([costs.memory[name] for name in names]),
        pinned=np.array(slot_model.pinned),
        links=links,
        stages=np.array([problem.stage_weight, fixed_s, gbit]),
        stage_of=np.array(slot_model.stage_of),
        first_slot=np.concatenate([[0], np.cumsum(problem.sizes)]),
        visits=np.array(slot_model.coverage).T.copy(),
        factors=_factors(robustness),
        overhead_s=costs.task_overhead_s,
        contention=CONTENTION[costs.contention],
        reduction=REDUCTION[problem.reduction],
        max_swaps=rules.max_swaps,
        max_swap_distance=rules.max_swap_distance,
        max_forward_jump=rules.max_forward_jump,
        free_origins=problem.free_origins,
    )


def _reductions(slot_model: SlotModel) -> tuple[Sequence[float], Sequence[float]]:
    """Return fixed reduction seconds and, where they follow from the placement, gradient Gbit of every stage."""
    problem, costs = slot_model.problem, slot_model.problem.costs
    none = [0.0] * problem.num_stages
    if costs.reduce_s is not None:
        return costs.reduce_s, none
    if problem.stage_bytes is None or costs.latency_s is None or costs.gbit_per_s is None:
        return none, none
    return none, [size_bytes * 8e-9 for size_bytes in problem.stage_bytes]


def _factors(robustness: Robustness | None) -> Floats:
    if robustness is None or robustness.sigma == 0:
        return np.zeros((0, 1))
    drawn = np.random.default_rng(0).normal(0.0, robustness.sigma, (robustness.samples, _FACTORS))
    return np.exp(drawn)


def _row_width(slot_model: SlotModel) -> int:
    """Return tasks per slot to make room for: all that can be on it, or many times its fair share."""
    everything = 3 * len(slot_model.origins)
    smallest = min(slot_model.problem.sizes)
    return min(everything, max(60, 8 * everything // smallest)) + 1


def _needed_width(routes: Sequence[SlotRoute], slots: int) -> int:
    visits = np.bincount(np.concatenate([np.array(route) for route in routes]), minlength=slots)
    return int(3 * visits.max()) + 1


def fill(schedule: Schedule, starts: Starts) -> None:
    """Put all tasks into an empty schedule in the order of `starts`."""
    rows: list[list[tuple[float, bool, int, int]]] = [[] for _ in schedule.placement]
    for m, row in enumerate(starts):
        if not row:
            continue
        route = schedule.routes[m, : schedule.lengths[m]].tolist()
        for index, slot in enumerate((*route, route[0], *reversed(route))):
            # A loss may take no time: then it comes before the task that starts with it.
            rows[slot].append((row[index], index != len(route), index, m << INDEX_BITS | index))
    for slot, entries in enumerate(rows):
        ordered = [task for *_, task in sorted(entries)]
        schedule.tasks[BUSY, slot, : len(ordered)] = ordered
        schedule.counts[BUSY, slot] = len(ordered)
