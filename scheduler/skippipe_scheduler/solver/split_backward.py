"""Which backwards to split, and when their weight gradients run: a pass over a finished plan.

Only the input gradient holds up the nodes before a node on the route; the weight gradient may run whenever the node
would be idle (zero-bubble pipelines: Qi et al., arXiv 2401.10241). The pass begins at the best of three orders: nothing
split, all split with every weight gradient at once, all split with weight gradients in the gaps where they hold up
nothing. From there single tasks on the critical path are split, joined again, moved and exchanged, each change
timed by the exact simulator, in a late acceptance hill climbing (Burke and Bykov, 2017). Origins keep their backwards
whole: nothing waits for an input gradient there.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

from skippipe_scheduler.analysis.critical_path import critical_path
from skippipe_scheduler.bounds import lower_bounds
from skippipe_scheduler.bounds.network import Network
from skippipe_scheduler.bounds.walks import Idle, idle_ends
from skippipe_scheduler.bounds.work import node_work_s
from skippipe_scheduler.budget import Budget
from skippipe_scheduler.errors import DeadlockError
from skippipe_scheduler.plan.plan import Plan, Task, split_backwards
from skippipe_scheduler.plan.simulate import OPERATION_NAMES, TaskSpan, Timeline, ends_hold, simulate_order
from skippipe_scheduler.problem.problem import Problem

Order = Mapping[str, tuple[Task, ...]]
Change = tuple[str, Callable[[], tuple[Task, ...]]]
"""A node, and what makes its new order."""

_STEPS = 5
"""Steps of the search that one exact simulation counts as, in a repeatable search. Chosen: a simulation of a small plan
takes some milliseconds, a step of the search some hundredths of one, but whole budgets would then be too short."""
_HISTORY = 30
"""A change is taken where it is no longer than the current order or that of so many changes ago. Chosen."""
_SEARCH_PART = 0.8
"""Share of the budget for changes; the rest is for joining what need not be split. Chosen."""
_PATIENCE = 600
"""Changes without a shorter iteration after which the pass ends. Chosen."""
_TO_THE_END = 0.2
"""Share of the moves of a weight gradient that put it last on its node, where it is often best. Chosen."""
_COMPACTNESS = 0.01
"""Weight of the mean end of the nodes beside the iteration time, which many orders share. Chosen."""


def plan_weight_gradients(plan: Plan, problem: Problem, budget: Budget, seed: int) -> Plan:
    """Return `plan` with backwards split where that shortens the exact iteration, never a longer one.

    Needs `costs.weight_s`. The bound of the returned plan is one that holds with backwards split, too.
    """
    pass_over = SplitSearch(plan, budget, random.Random(seed))
    order, timeline = pass_over.run()
    return plan.model_copy(update={"order": dict(order), "predicted": timeline.predicted(split_bound_s(problem))})


def input_gradients_alone(problem: Problem) -> Problem:
    """Return the problem without weight gradients that can be split off; its bounds hold with splits."""
    origins = problem.stages[0].nodes if problem.stages else ()
    weight_s = {node: taken_s for node, taken_s in (problem.costs.weight_s or {}).items() if node not in origins}
    backward_s = {node: taken_s - weight_s.get(node, 0.0) for node, taken_s in problem.costs.backward_s.items()}
    costs = problem.costs.model_copy(update={"backward_s": backward_s, "weight_s": None})
    return problem.model_copy(update={"costs": costs})


def split_bound_s(problem: Problem) -> float:
    """Return a lower bound of the iteration where backwards may be split.

    Chains of tasks count without weight gradients, the work of a node with them.
    """
    network = Network(problem)
    idle = idle_ends(network)
    work_s = node_work_s(network, Idle(idle.head_s, np.where(np.isinf(idle.tail_s), np.inf, 0.0)))
    return max(*lower_bounds(input_gradients_alone(problem), 0.0).values(), work_s * (1 - 1e-9))


@dataclass(frozen=True)
class _Timed:
    order: Order
    timeline: Timeline
    score: float

    @property
    def key(self) -> tuple[float, float]:
        """What makes one better than another: a shorter iteration, then the score; rounding does not count."""
        return float(f"{self.timeline.iteration_s:.9g}"), float(f"{self.score:.9g}")


class SplitSearch:
    """One pass over one plan: which backwards to split and where their weight gradients run."""

    def __init__(self, plan: Plan, budget: Budget, generator: random.Random) -> None:
        self.plan, self.budget, self.generator = plan, budget, generator
        self.weight_s = plan.costs.weight_s or {}
        self.paths = [microbatch.whole_path for microbatch in plan.microbatches]
        self.splittable = {
            (node, microbatch.id) for microbatch in plan.microbatches for node in microbatch.route[1:]
        } & {(node, microbatch.id) for node in self.weight_s for microbatch in plan.microbatches}

    def run(self) -> tuple[Order, Timeline]:
        """Return the best order found and its timeline."""
        whole = self.timed(self.plan.order)
        if whole is None:
            raise DeadlockError("the plan to be split deadlocks")
        if not self.splittable:
            return whole.order, whole.timeline
        starts = [whole, self.timed(self._all_at_once()), self.timed(self._in_gaps(self._all_at_once()))]
        best = self._search(min((start for start in starts if start is not None), key=lambda start: start.key))
        best = self._joined(best)
        chosen = best if best.timeline.iteration_s < whole.timeline.iteration_s else whole
        return chosen.order, chosen.timeline

    def timed(self, order: Order) -> _Timed | None:
        """Return `order` with its exact times; None where it deadlocks or holds too much."""
        self.budget.spent += _STEPS
        try:
            timeline = self._simulate(order)
        except DeadlockError:
            return None
        if any(held > self.plan.costs.memory[node] for node, held in timeline.peak_memory.items()):
            return None
        ends_s: dict[str, float] = {}
        for span in timeline.tasks:
            ends_s[span.node] = max(ends_s.get(span.node, 0.0), span.end_s)
        score = timeline.iteration_s + _COMPACTNESS * sum(ends_s.values()) / max(1, len(ends_s))
        return _Timed(order, timeline, score)

    def _simulate(self, order: Order) -> Timeline:
        stages = [stage.nodes for stage in self.plan.stages]
        return simulate_order(
            self.paths, order, self.plan.costs, stages=stages, reduce_s=self.plan.costs.reduce_s or ()
        )

    def _all_at_once(self) -> Order:
        """Split everything; each weight gradient follows its input gradient."""
        return {
            node: tuple(
                part
                for task in tasks
                for part in (
                    (task, Task("W", task.microbatch))
                    if task.operation == "B" and (node, task.microbatch) in self.splittable
                    else (task,)
                )
            )
            for node, tasks in self.plan.order.items()
        }

    def _in_gaps(self, order: Order) -> Order:
        """Put off every weight gradient to the first gap that it fits in, or to the end, as far as memory lets it.

        Gaps are those of the order without any weight gradient, so filling them holds up nothing.
        """
        bare = {node: tuple(task for task in tasks if task.operation != "W") for node, tasks in order.items()}
        shorter = {
            node: taken_s - self.weight_s.get(node, 0.0) if split_backwards(order[node]) else taken_s
            for node, taken_s in self.plan.costs.backward_s.items()
            if node in order
        }
        costs = self.plan.costs.model_copy(update={"backward_s": self.plan.costs.backward_s | shorter})
        spans: dict[str, list[TaskSpan]] = {node: [] for node in order}
        for span in simulate_order(self.paths, bare, costs).tasks:
            spans[span.node].append(span)
        return {node: tuple(self._filled(node, spans[node], split_backwards(order[node]))) for node in order}

    def _filled(self, node: str, spans: Sequence[TaskSpan], split: frozenset[int]) -> Iterator[Task]:
        overhead_s, memory = self.plan.costs.task_overhead_s, self.plan.costs.memory[node]
        taken_s = self.weight_s.get(node, 0.0) + overhead_s
        open_weights: deque[int] = deque()
        held, free_s = 0, 0.0
        for span in spans:
            while open_weights and (
                free_s + taken_s <= span.start_s * (1 + 1e-12) or (span.operation == "F" and held >= memory)
            ):
                yield Task("W", open_weights.popleft())
                held -= 1
                free_s += taken_s
            task = Task(span.operation, span.microbatch)
            yield task
            held += (task.operation == "F") - ends_hold(task, split)
            free_s = span.end_s + overhead_s
            if task.operation == "B" and task.microbatch in split:
                open_weights.append(task.microbatch)
        for microbatch in open_weights:
            yield Task("W", microbatch)

    def _search(self, start: _Timed) -> _Timed:
        """Change tasks on the critical path at random until the budget is spent or nothing has helped for long."""
        current = best = start
        scores = [start.score] * _HISTORY
        changes = [*self._changes(current)]
        budget = self.budget.share(_SEARCH_PART)
        spent_before = self.budget.spent
        step = last_better = 0
        while changes and not budget.exhausted and step - last_better < _PATIENCE:
            step += 1
            budget.spent = self.budget.spent - spent_before
            node, change = self.generator.choice(changes)
            candidate = self.timed({**current.order, node: change()})
            if candidate is not None and candidate.score <= max(current.score, scores[step % _HISTORY]):
                current = candidate
                changes = [*self._changes(current)]
                if current.key < best.key:
                    best, last_better = current, step
            scores[step % _HISTORY] = current.score
        return best

    def _changes(self, timed: _Timed) -> Iterator[Change]:
        """Yield every change of a task on the critical path: split, join, move, exchange with the one before it."""
        on_path = [
            (segment.node, Task(operation, segment.microbatch))
            for segment in critical_path(self.plan, timed.timeline).segments
            for operation, name in OPERATION_NAMES.items()
            if segment.kind == name
        ]
        for node, task in on_path:
            tasks = timed.order[node]
            weight = Task("W", task.microbatch)
            if task.operation == "B" and (node, task.microbatch) in self.splittable:
                yield node, partial(self._moved, tasks, weight)
            elif task.operation == "W":
                yield node, partial(_without, tasks, weight)
                yield node, partial(self._moved, tasks, weight)
        for (first_node, first), (node, second) in pairwise(on_path):
            tasks = timed.order[node]
            place = tasks.index(second)
            if first_node == node and tasks[place - 1] == first and first.microbatch != second.microbatch:
                yield node, partial(_exchanged, tasks, place)

    def _moved(self, tasks: tuple[Task, ...], weight: Task) -> tuple[Task, ...]:
        """Return `tasks` with a weight gradient at another place behind its input gradient."""
        rest = [task for task in tasks if task != weight]
        first = rest.index(Task("B", weight.microbatch)) + 1
        place = len(rest) if self.generator.random() < _TO_THE_END else self.generator.randint(first, len(rest))
        return (*rest[:place], weight, *rest[place:])

    def _joined(self, timed: _Timed) -> _Timed:
        """Join every split that is of no use again, as far as the budget goes: fewer tasks, and less is held."""
        for node, tasks in timed.order.items():
            for microbatch in sorted(split_backwards(tasks)):
                if self.budget.exhausted:
                    return timed
                rest = _without(timed.order[node], Task("W", microbatch))
                joined = self.timed({**timed.order, node: rest})
                if joined is not None and joined.timeline.iteration_s <= timed.timeline.iteration_s:
                    timed = joined
        return timed


def _without(tasks: tuple[Task, ...], weight: Task) -> tuple[Task, ...]:
    return tuple(task for task in tasks if task != weight)


def _exchanged(tasks: tuple[Task, ...], place: int) -> tuple[Task, ...]:
    """Return `tasks` with the one at `place` before the one that stood before it."""
    return (*tasks[: place - 1], tasks[place], tasks[place - 1], *tasks[place + 1 :])
