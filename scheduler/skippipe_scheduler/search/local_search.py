"""Large neighbourhood search over routes, order and, where it is free, placement: the compiled kernel, fed and read."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from skippipe_scheduler.budget import Budget
from skippipe_scheduler.options import Robustness
from skippipe_scheduler.search.instance import fill_schedule, make_instance, sharing_of
from skippipe_scheduler.search.kernel.anneal import (
    anneal,
    anneal_dispatched,
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
    INDEX_BITS,
    INDEX_MASK,
    REDUCE_GBIT,
    Cooling,
    Floats,
    Integers,
    Schedule,
    empty_schedule,
    make_queue,
    make_work,
)
from skippipe_scheduler.search.kernel.dispatching import ANY_NUMBER, dispatch, make_dispatching
from skippipe_scheduler.search.kernel.jit import slowness
from skippipe_scheduler.search.kernel.loads import Balancing, anneal_loads, empty_loads
from skippipe_scheduler.search.kernel.timing import retime
from skippipe_scheduler.search.tuning import LOCAL_SEARCH, LocalSearchTuning
from skippipe_scheduler.slots.slot_model import SlotCosts, SlotModel, SlotPlacement, SlotRoute
from skippipe_scheduler.slots.solution import Solution


class LocalSearch:
    """Improves one schedule of a problem by slot; all randomness comes from `seed`.

    Where it need not be `repeatable`, it begins with less where nothing is compiled.
    """

    def __init__(
        self,
        slot_model: SlotModel,
        seed: int,
        robustness: Robustness | None = None,
        tuning: LocalSearchTuning = LOCAL_SEARCH,
        *,
        repeatable: bool = False,
    ) -> None:
        self.slot_model, self.seed, self.tuning, self.repeatable = slot_model, seed, tuning, repeatable
        self.free = slot_model.given_placement() is None
        self.instance = make_instance(slot_model, robustness, tuning.jitter_factors)
        self.work = make_work(self.instance, self._padded([()]), seed)
        self.queue = make_queue(self.instance, len(slot_model.origins), sharing_of(slot_model))
        self.width = _row_width(slot_model, tuning)
        self.scores: Floats = np.full((3, 2), np.inf)
        self.large = slot_model.num_tasks > tuning.large_tasks
        self.temperature = tuning.temperature * max(1.0, tuning.small_tasks / slot_model.num_tasks)
        self.most_begun = ANY_NUMBER
        """Microbatches that an origin has under way at a time in schedules that are dispatched."""
        self.relaying = False
        """Whether the schedule at hand has nodes that only relay."""
        self.steps = 0
        self.rate = tuning.first_chunk / tuning.chunk_s

    def start(self, placement: SlotPlacement, routes: Sequence[SlotRoute], *, fewer_begun: bool = False) -> Solution:
        """Begin at the best of a few insertion sequences and a dispatch for the given placement and routes.

        With `fewer_begun`, where cards or capacities are shared, also at schedules in which less is under way at a
        time: messages of many microbatches block each other there.
        """
        self._allocate(placement, routes)
        costs = SlotCosts(self.slot_model, placement)
        self._dispatch(ANY_NUMBER)
        if self.inserting_takes_minutes and self.scores[2, 0] < np.inf:
            return self._continue()
        if fewer_begun and self.slot_model.shares_capacity:
            most_begun = int(self.instance.memory.max()) // 2
            while most_begun:
                self._dispatch(most_begun)
                most_begun //= 2
        trips_s = np.array([costs.chain(route).round_trip_s for route in routes])
        origins = np.array([route[0] for route in routes])
        if self.large:
            if not self.slot_model.shares_capacity or self.scores[2, 0] == np.inf:
                sequence = self._longest_left(origins, trips_s)
                self._construct(sequence, self.tuning.large_start_wait)
                self._construct(sequence, self.tuning.large_start_wait, rerouted=True)
            if self.scores[2, 0] < np.inf:
                return self._continue()
        waves = np.lexsort((-trips_s, turns_of(origins)))
        for sequence in (waves, np.argsort(-trips_s, kind="stable")):
            for wait in self.tuning.start_waits:
                self._construct(sequence, wait)
        return self._continue()

    @property
    def inserting_takes_minutes(self) -> bool:
        """Whether all but a dispatch would go far beyond a time limit: nothing is compiled."""
        many = self.slot_model.num_tasks > self.tuning.most_inserted_in_python
        return many and slowness() > 1 and not self.repeatable

    def _construct(self, sequence: Integers, wait: float, *, rerouted: bool = False) -> None:
        """Try the schedule of an insertion sequence, in which no task waits longer than `wait` mean backward times."""
        wait_s = wait * float(np.mean(self.instance.node_s[1]))
        self.candidate.routes[:] = self.begun_with  # whatever an earlier try has made of them
        if construct(self.instance, self.candidate, self.work, self.queue, sequence, wait_s, rerouted):
            self._keep_better()

    def _longest_left(self, origins: Integers, trips_s: Floats) -> Integers:
        """Return a sequence in which the origin with the most time left comes next, as in list scheduling."""
        shuffled = np.random.default_rng(self.seed).permutation(len(origins))
        memory = self.instance.memory[self.candidate.placement]
        left_s = np.zeros(len(origins))
        for origin in np.unique(origins):
            row = shuffled[origins[shuffled] == origin]
            left_s[row] = trips_s[row][::-1].cumsum()[::-1] / memory[origin]
        return np.argsort(-left_s, kind="stable")

    def _dispatch(self, most_begun: int) -> None:
        """Try the schedule in which no node rests without reason: insertion leaves gaps at a slow stage."""
        before_s = self.scores[2, 0]
        if dispatch(self.instance, self.candidate, self.queue, self.dispatching, most_begun):
            self._keep_better()
        if self.scores[2, 0] < before_s:
            self.most_begun = most_begun

    def balance_loads(
        self,
        placement: SlotPlacement,
        routes: Sequence[SlotRoute],
        steps: int,
        *,
        exchange: bool = True,
        limit_s: float = math.inf,
        stop: threading.Event | None = None,
    ) -> tuple[SlotPlacement, list[SlotRoute]]:
        """Return a placement and routes with lighter loads, to `start` from (`skippipe_scheduler.search.kernel.loads`).

        Where the placement is free, nodes are exchanged too if `exchange`. It cools over `steps`, or as many as
        `limit_s` has time for; `stop` ends it early.
        """
        padded, lengths = self._padded(routes), np.array([len(route) for route in routes])
        changed = empty_schedule(np.array(placement), padded, lengths, 1)
        loads = empty_loads(self.instance, self.queue.sharing.resources.shape[1])
        tuning, sharing = self.tuning, self.queue.sharing
        share = tuning.exchange_share / (1 + len(routes) / tuning.exchange_routes) if self.free and exchange else 0.0
        temperature = tuning.load_temperature * min(1.0, tuning.load_temperature_routes / len(routes)) ** 2
        # Where a node stands matters more than one route as soon as it decides what its card or its gradients take.
        heat = 1.0
        trip_weight = tuning.trip_weight_of_shared if self.slot_model.shares_capacity else tuning.trip_weight
        if share and (self.slot_model.shares_capacity or self.instance.stages[REDUCE_GBIT].any()):
            share, heat = tuning.exchange_share_of_cards, tuning.load_temperature / temperature
        for chunk, begin, end in load_chunks(steps, limit_s, tuning):
            if stop is not None and stop.is_set():
                break
            cooled, cooling = temperature * tuning.load_cooling**begin, tuning.load_cooling ** (end - begin)
            balancing = Balancing(chunk, cooled, cooling, share, heat, trip_weight)
            anneal_loads(self.instance, changed, self.work, sharing, loads, balancing)
        found = zip(changed.routes.tolist(), changed.lengths.tolist(), strict=True)
        return tuple(changed.placement.tolist()), [tuple(row[:length]) for row, length in found]

    def resume(self, solution: Solution) -> Solution:
        """Begin at a given solution, whose order is kept and timed anew.

        Where nodes relay in it, all routes must visit every stage in order; the search then goes on over what each
        microbatch leaves out, too.
        """
        self._allocate(solution.placement, solution.routes)
        if solution.relays:
            self.relaying = True
            self.candidate.relays[:] = solution.relays
        fill_schedule(self.candidate, solution.starts)
        if retime(self.instance, self.candidate, self.queue, -1):
            self._keep_better()
        return self._continue()

    def repair(self, solution: Solution) -> Solution:
        """Begin at a solution in which some microbatches have no starts: they are inserted, the rest keep their order.

        Where that order breaks a rule by now, all are inserted anew.
        """
        missing = [m for m, row in enumerate(solution.starts) if not row]
        self._allocate(solution.placement, solution.routes)
        fill_schedule(self.candidate, solution.starts)
        retime(self.instance, self.candidate, self.queue, -1)
        wait_s = self.tuning.repair_wait * float(np.mean(self.instance.node_s[1]))
        sequence = np.array(missing, np.int64)
        if insert_sequence(self.instance, self.candidate, self.work, self.queue, sequence, wait_s, False):
            self._keep_better()
            return self._continue()
        return self.start(solution.placement, solution.routes)

    def greedy_insert(self, solution: Solution, budget: Budget) -> Solution:
        """Begin at the routes of a solution, its microbatches inserted in the sequence of their starts.

        One insertion at least is made; the others as far as `budget` has time for them. Where nothing is compiled, the
        microbatches of large problems are dispatched instead.
        """
        self._allocate(solution.placement, solution.routes)
        if self.inserting_takes_minutes:
            self._dispatch(ANY_NUMBER)
            if self.scores[2, 0] < np.inf:
                return self._continue()
        sequence = np.argsort([row[0] for row in solution.starts], kind="stable")
        for factor in self.tuning.greedy_waits:
            wait_s = factor * float(self.instance.node_s[1].max())
            if construct(self.instance, self.candidate, self.work, self.queue, sequence, wait_s, False):
                self._keep_better()
            if not budget.repeatable and budget.exhausted:
                break
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
            exponent = self.tuning.cooling_exponent
            from_s, to_s = temperature_s * (1 - before) ** exponent, temperature_s * (1 - until) ** exponent
            spent = self._anneal(Cooling(chunk, from_s, to_s, limit_s, self.relaying))
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
            tuple(tuple(map(bool, row)) for row in self.best.relays.tolist()) if self.relaying else (),
            tuple(map(self._sequence, range(len(self.best.placement)))) if self.relaying else (),
        )

    def _sequence(self, slot: int) -> tuple[tuple[int, int], ...]:
        """Return microbatch and index in its chain of each task of a slot of the best schedule."""
        tasks = self.best.tasks[BUSY, slot, : self.best.counts[BUSY, slot]].tolist()
        return tuple((task >> INDEX_BITS, task & INDEX_MASK) for task in tasks)

    def _allocate(self, placement: SlotPlacement, routes: Sequence[SlotRoute]) -> None:
        padded, lengths = self._padded(routes), np.array([len(route) for route in routes])
        self.begun_with = padded
        width = max(self.width, _needed_width(routes, len(placement)))
        make: Callable[[], Schedule] = lambda: empty_schedule(np.array(placement), padded, lengths, width)  # noqa: E731
        self.current, self.candidate, self.best = make(), make(), make()
        self.dispatching = make_dispatching(len(routes), len(placement), width)
        self.scores[:] = np.inf
        self.relaying = False

    def _padded(self, routes: Sequence[SlotRoute]) -> Integers:
        table = np.zeros((len(self.slot_model.origins), self.slot_model.longest), np.int64)
        for row, route in zip(table, routes, strict=False):
            row[: len(route)] = route
        return table

    def _keep_better(self) -> None:
        """Keep the candidate where it is better than the best."""
        evaluate(self.instance, self.candidate, self.queue, self.scores[0])
        if is_better(self.scores):
            copy_schedule(self.best, self.candidate)
            self.scores[2] = self.scores[0]

    def _continue(self) -> Solution:
        self.restart()
        return self.best_solution()

    def _chunk(self, budget: Budget) -> int:
        if budget.evaluations is not None:
            return min(self.tuning.repeatable_chunk, budget.evaluations - budget.spent)
        left_s = budget.limit_s - budget.elapsed_s
        return max(self.tuning.least_chunk, int(self.rate * min(self.tuning.chunk_s, left_s)))

    def _share(self, budget: Budget, chunk: int) -> float:
        if budget.evaluations is not None:
            return chunk / max(1, budget.evaluations)
        return chunk / self.rate / max(1e-9, budget.limit_s)

    def _anneal(self, cooling: Cooling) -> int:
        clock = Budget(1.0)
        if self.large and self.slot_model.shares_capacity:
            schedules = self.current, self.candidate, self.best
            spent = anneal_dispatched(
                self.instance,
                *schedules,
                self.work,
                self.queue,
                self.dispatching,
                self.scores,
                cooling,
                self.most_begun,
            )
        elif self.large and not self.relaying and not len(self.instance.factors):  # with jitter nothing stays in place
            spent = anneal_in_place(self.instance, self.current, self.best, self.work, self.queue, self.scores, cooling)
        else:
            schedules = self.current, self.candidate, self.best
            spent = anneal(self.instance, *schedules, self.work, self.queue, self.scores, cooling, self.free)
        rate = max(1, spent) / max(1e-6, clock.elapsed_s)
        memory = self.tuning.rate_memory
        self.rate = memory * self.rate + (1 - memory) * rate
        return spent


def turns_of(origins: Integers) -> Integers:
    """Return of each microbatch how many of its origin come before it."""
    turns = np.zeros(len(origins), np.int64)
    for origin in np.unique(origins):
        mine = origins == origin
        turns[mine] = np.arange(mine.sum())
    return turns


def load_chunks(steps: int, limit_s: float, tuning: LocalSearchTuning) -> Iterator[tuple[int, float, float]]:
    """Yield steps on the loads to make at once, with the shares of the way before and after them, 0 to 1.

    The way is `steps` long or, where these take longer, `limit_s`.
    """
    if math.isinf(limit_s):
        parts = max(1, steps // tuning.load_chunk)
        yield from ((steps // parts, part / parts, (part + 1) / parts) for part in range(parts))
        return
    clock, chunk, step_s, gone = Budget(limit_s), min(steps, tuning.first_chunk), 0.0, 0.0
    while gone < 1:
        begin_s = clock.elapsed_s
        end = min(1.0, gone + max(chunk / steps, chunk * step_s / limit_s))
        yield chunk, gone, end
        step_s = (clock.elapsed_s - begin_s) / chunk
        gone = max(end, clock.fraction)
        affordable = min((1 - gone) * steps, min(clock.left_s, tuning.load_chunk_s) / max(step_s, 1e-9))
        chunk = max(1, min(tuning.load_chunk, math.ceil(affordable)))


def _row_width(slot_model: SlotModel, tuning: LocalSearchTuning) -> int:
    """Return tasks per slot to make room for: all that can be on it, or many times its fair share."""
    everything = 3 * len(slot_model.origins)
    smallest = min(slot_model.problem.sizes)
    return min(everything, max(tuning.least_row, tuning.row_shares * everything // smallest)) + 1


def _needed_width(routes: Sequence[SlotRoute], slots: int) -> int:
    visits = np.bincount(np.concatenate([np.array(route) for route in routes]), minlength=slots)
    return int(3 * visits.max()) + 1
