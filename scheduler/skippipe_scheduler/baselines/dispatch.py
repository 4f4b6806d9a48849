"""List scheduling by dispatch rules: whenever a node is free, it starts the most urgent task that waits there.

This is what people do who do not plan ahead. Routes and placement are given; a rule only chooses the order. A node with
no room for a further microbatch starts no forward. Where all routes visit the stages in ascending order, the highest
stage always drains, so no rule deadlocks; with swaps, full nodes may wait for each other for ever.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

from skippipe_scheduler.errors import DeadlockError, PlanError
from skippipe_scheduler.plan.plan import Plan, Solver
from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.slots.assemble import finished_plan
from skippipe_scheduler.slots.slot_model import SlotCosts, SlotModel, SlotPlacement, SlotRoute
from skippipe_scheduler.slots.solution import Solution

Waiting = tuple[float, float, int, int]
"""A task that waits at a node: urgency (least first), arrival in seconds, microbatch, index in its chain."""


@dataclass(frozen=True)
class DispatchRule:
    """How a node chooses among the tasks that wait.

    `urgency` maps (run, microbatch, index in its chain) to a number, when the task arrives; the least goes first, then
    the one that came first. With `reserves`, a microbatch starts at its origin only when every node of its route has
    room, and takes that room at once: this never deadlocks. With `limits_in_flight`, the node at hop h of a route of P
    stages holds at most P - h + 1 microbatches. With `in_waves`, the order is fixed as in GPipe: as many
    microbatches as fit go forward everywhere before any goes backward.
    """

    urgency: Callable[["_DispatchRun", int, int], float]
    reserves: bool = False
    limits_in_flight: bool = False
    in_waves: bool = False


def _first_come(run: "_DispatchRun", microbatch: int, index: int) -> float:
    return 0.0


def _backward_first(run: "_DispatchRun", microbatch: int, index: int) -> float:
    return 0.0 if index >= len(run.routes[microbatch]) else 1.0


def _loss_first(run: "_DispatchRun", microbatch: int, index: int) -> float:
    return -1.0 if index == len(run.routes[microbatch]) else _backward_first(run, microbatch, index)


def _forward_first(run: "_DispatchRun", microbatch: int, index: int) -> float:
    return -_backward_first(run, microbatch, index)


def _longest_remaining(run: "_DispatchRun", microbatch: int, index: int) -> float:
    return -run.remaining_s[microbatch][index]


def _shortest_remaining(run: "_DispatchRun", microbatch: int, index: int) -> float:
    return run.remaining_s[microbatch][index]


def _most_left(run: "_DispatchRun", microbatch: int, index: int) -> float:
    return -float(run.left[run.routes[microbatch][0]])


DISPATCH_RULES: Mapping[str, DispatchRule] = {
    "first_come": DispatchRule(_first_come),
    "backward_first": DispatchRule(_backward_first),
    "loss_first": DispatchRule(_loss_first),
    "forward_first": DispatchRule(_forward_first),
    "longest_remaining_first": DispatchRule(_longest_remaining),
    "shortest_remaining_first": DispatchRule(_shortest_remaining),
    "origin_with_most_left_first": DispatchRule(_most_left),
    "reserved_first_come": DispatchRule(_first_come, reserves=True),
    "reserved_backward_first": DispatchRule(_backward_first, reserves=True),
    "reserved_longest_remaining_first": DispatchRule(_longest_remaining, reserves=True),
    "gpipe": DispatchRule(_forward_first, in_waves=True),
    "one_forward_one_backward": DispatchRule(_backward_first, limits_in_flight=True),
}
"""Rules by name. GPipe (Huang et al., arXiv 1811.06965) with its flush after each wave, and 1F1B (PipeDream-Flush,
Narayanan et al., arXiv 2006.09503), which holds one microbatch more than in the paper, because here the last node waits
for the loss at the origin. `loss_first` is that loss, then backwards, then forwards: a loss is short, and holds up the
last node where the origin has something else to do."""


def dispatch(problem: Problem, placement: SlotPlacement, routes: Sequence[SlotRoute], rule: str) -> Plan:
    """Return the plan in which the nodes follow the named rule of `DISPATCH_RULES`, timed exactly.

    `placement` and `routes` are by slot (see `slots.py`; `slots_of_plan` reads them from a plan). Where links are
    shared, nodes choose as if they were not; the times are exact all the same. Raises `DeadlockError` naming who
    waits, `PlanError` where there is no such rule.
    """
    begin_s = perf_counter()
    slot_model = SlotModel(problem)
    solution = dispatch_solution(SlotCosts(slot_model, placement), routes, rule)
    return _plan(slot_model, solution, rule, perf_counter() - begin_s)


def best_dispatch(problem: Problem, placement: SlotPlacement, routes: Sequence[SlotRoute]) -> Plan:
    """Return the plan of the best rule of `DISPATCH_RULES` that does not deadlock; there always is one."""
    begin_s = perf_counter()
    slot_model = SlotModel(problem)
    costs = SlotCosts(slot_model, placement)
    found = solutions_by_rule(costs, routes)
    if problem.costs.contention != "none":
        plans = [_plan(slot_model, solution, name, perf_counter() - begin_s) for name, solution in found.items()]
        return min(plans, key=lambda plan: plan.predicted.iteration_s)
    best = min(found, key=lambda name: found[name].iteration_s)
    return _plan(slot_model, found[best], best, perf_counter() - begin_s)


def dispatch_solution(costs: SlotCosts, routes: Sequence[SlotRoute], rule: str) -> Solution:
    """Return the schedule by slot that the named rule makes; raise like `dispatch`."""
    if rule not in DISPATCH_RULES:
        raise PlanError(f"dispatch rule {rule!r} is unknown; choose one of {', '.join(DISPATCH_RULES)}")
    chosen = DISPATCH_RULES[rule]
    if chosen.in_waves:
        starts = _earliest_starts(costs, routes, _in_waves(costs, routes))
    else:
        run = _DispatchRun(costs, routes, chosen)
        run.execute()
        starts = _earliest_starts(costs, routes, _by_start(run.starts)) if chosen.reserves else run.starts
    iteration_s = _iteration_s(costs, routes, starts)
    return Solution(costs.placement, tuple(routes), tuple(map(tuple, starts)), iteration_s, iteration_s)


def solutions_by_rule(costs: SlotCosts, routes: Sequence[SlotRoute]) -> dict[str, Solution]:
    """Return the schedule of every rule that does not deadlock; those that reserve rooms never do."""
    found: dict[str, Solution] = {}
    for name in DISPATCH_RULES:
        try:
            found[name] = dispatch_solution(costs, routes, name)
        except DeadlockError:
            continue
    return found


def slots_of_plan(plan: Plan) -> tuple[SlotPlacement, tuple[SlotRoute, ...]]:
    """Return the placement and the routes of a plan by slot."""
    names = [node for stage in plan.stages for node in stage.nodes]
    slot = {name: index for index, name in enumerate(names)}
    placement = tuple(plan.rank_of[name] for name in names)
    return placement, tuple(tuple(slot[name] for name in microbatch.route) for microbatch in plan.microbatches)


def _plan(slot_model: SlotModel, solution: Solution, rule: str, wall_s: float) -> Plan:
    solver = Solver(name=f"dispatch {rule}", version="1", seed=0, time_limit_s=0.0, wall_s=round(wall_s, 3))
    return finished_plan(slot_model, solution, 0.0, solver, None)


def _iteration_s(costs: SlotCosts, routes: Sequence[SlotRoute], starts: Sequence[Sequence[float]]) -> float:
    """Return the end of the last task or reduction, where links are not shared."""
    last_s = [0.0] * len(costs.placement)
    for route, row in zip(routes, starts, strict=True):
        for hop, slot in enumerate(route):
            last_s[slot] = max(last_s[slot], row[2 * len(route) - hop] + costs.backward_s[slot])
    slots_of = costs.slot_model.slots_of
    return max(
        max(last_s[slot] for slot in slots) + reduce_s for slots, reduce_s in zip(slots_of, costs.reduce_s, strict=True)
    )


class _DispatchRun:
    """One run of a rule, event by event; plain lists, because this is the loop that large problems sit in."""

    def __init__(self, costs: SlotCosts, routes: Sequence[SlotRoute], rule: DispatchRule) -> None:
        slots = len(costs.placement)
        self.costs, self.routes, self.rule = costs, routes, rule
        self.chains = [costs.chain(route) for route in routes]
        self.remaining_s = _remaining(costs, routes)
        self.starts = [[0.0] * (2 * len(route) + 1) for route in routes]
        self.left = [0] * slots
        """Microbatches of each origin that have not ended."""
        self.held = [0] * slots
        self.busy = [False] * slots
        self.forwards: list[list[Waiting]] = [[] for _ in range(slots)]
        self.others: list[list[Waiting]] = [[] for _ in range(slots)]
        self.blocked: list[list[Waiting]] = [[] for _ in range(slots)]
        """Forwards at their origins that wait for room at this slot, where rooms are reserved."""
        self.events: list[tuple[float, int, int, int, bool]] = []
        """(seconds, slot, microbatch, index, whether the slot is free of this task, else it arrives)."""

    def execute(self) -> None:
        """Run everything; raise `DeadlockError` where it stops before the end."""
        for microbatch, route in enumerate(self.routes):
            self.left[route[0]] += 1
            self.events.append((0.0, route[0], microbatch, 0, False))
        heapq.heapify(self.events)
        while self.events:
            now_s = self.events[0][0]
            touched: set[int] = set()
            while self.events and self.events[0][0] == now_s:
                self._take_in(heapq.heappop(self.events), touched)
            for slot in sorted(touched):
                if not self.busy[slot]:
                    self._start_next(slot, now_s)
        if any(self.left):
            raise DeadlockError(self._who_waits())

    def _take_in(self, event: tuple[float, int, int, int, bool], touched: set[int]) -> None:
        now_s, slot, microbatch, index, ended = event
        touched.add(slot)
        length = len(self.routes[microbatch])
        if not ended:
            waiting = (self.rule.urgency(self, microbatch, index), now_s, microbatch, index)
            heapq.heappush(self.forwards[slot] if index < length else self.others[slot], waiting)
            return
        self.busy[slot] = False
        if index > length:
            self.held[slot] -= 1
            for waiting in self.blocked[slot]:
                origin = self.routes[waiting[2]][0]
                heapq.heappush(self.forwards[origin], waiting)
                touched.add(origin)
            self.blocked[slot].clear()
        if index == 2 * length:
            self.left[slot] -= 1

    def _start_next(self, slot: int, now_s: float) -> None:
        others = self.others[slot]
        forward = self._forward_with_room(slot)
        if forward is not None and (not others or forward < others[0]):
            heapq.heappop(self.forwards[slot])
            _, _, microbatch, index = forward
            for taken in self._rooms(microbatch, index, slot):
                self.held[taken] += 1
        elif others:
            _, _, microbatch, index = heapq.heappop(others)
        else:
            return
        chain = self.chains[microbatch]
        self.starts[microbatch][index] = now_s
        self.busy[slot] = True
        end_s = now_s + chain.durations_s[index]
        heapq.heappush(self.events, (end_s + self.costs.overhead_s, slot, microbatch, index, True))
        if index + 1 < len(chain.slots):
            arrival_s = end_s + chain.delays_s[index]
            heapq.heappush(self.events, (arrival_s, chain.slots[index + 1], microbatch, index + 1, False))

    def _rooms(self, microbatch: int, index: int, slot: int) -> Sequence[int]:
        """Return the slots whose memory a forward takes as it starts."""
        if not self.rule.reserves:
            return (slot,)
        return self.routes[microbatch] if index == 0 else ()

    def _forward_with_room(self, slot: int) -> Waiting | None:
        """Return the most urgent forward that may start; where rooms are reserved, set aside those that may not."""
        forwards = self.forwards[slot]
        while forwards:
            _, _, microbatch, index = forwards[0]
            full = [
                s for s in self._rooms(microbatch, index, slot) if self.held[s] >= self._limit(microbatch, index, s)
            ]
            if not full:
                return forwards[0]
            if not self.rule.reserves:
                return None
            self.blocked[full[0]].append(heapq.heappop(forwards))
        return None

    def _limit(self, microbatch: int, index: int, slot: int) -> int:
        memory = self.costs.memory[slot]
        return min(memory, len(self.routes[microbatch]) - index + 1) if self.rule.limits_in_flight else memory

    def _who_waits(self) -> str:
        problem, waiting = self.costs.slot_model.problem, []
        for slot, forwards in enumerate(self.forwards):
            if forwards:
                name = problem.nodes[self.costs.placement[slot]]
                waiting.append(
                    f"{name} holds {self.held[slot]} microbatches, its limit, and cannot start the forward of "
                    f"microbatch {forwards[0][2]}"
                )
        more = f" and {len(waiting) - 3} more" if len(waiting) > 3 else ""
        return f"the dispatch rule deadlocks: {'; '.join(waiting[:3])}{more}; use a rule that reserves the route's room"


def _remaining(costs: SlotCosts, routes: Sequence[SlotRoute]) -> list[list[float]]:
    """Return for every task of every microbatch the least time from its start to the microbatch's end."""
    by_route: dict[SlotRoute, list[float]] = {}
    for route in routes:
        if route not in by_route:
            chain, left_s = costs.chain(route), 0.0
            suffix = []
            for duration_s, delay_s in zip(reversed(chain.durations_s), reversed(chain.delays_s), strict=True):
                left_s += duration_s + delay_s
                suffix.append(left_s)
            by_route[route] = suffix[::-1]
    return [by_route[route] for route in routes]


def _earliest_starts(
    costs: SlotCosts, routes: Sequence[SlotRoute], sequence: Iterable[tuple[int, int]]
) -> list[list[float]]:
    """Return the starts when every slot runs its tasks (microbatch, index) in `sequence`, each as early as it can.

    Whoever reserves rooms waits at the origin, although only the order is needed to keep the rooms free.
    """
    chains = [costs.chain(route) for route in routes]
    starts = [[0.0] * len(chain.slots) for chain in chains]
    ready_s = [0.0] * len(routes)
    free_s = [0.0] * len(costs.placement)
    for microbatch, index in sequence:
        chain = chains[microbatch]
        slot = chain.slots[index]
        start_s = max(ready_s[microbatch], free_s[slot])
        end_s = start_s + chain.durations_s[index]
        starts[microbatch][index] = start_s
        ready_s[microbatch], free_s[slot] = end_s + chain.delays_s[index], end_s + costs.overhead_s
    return starts


def _by_start(starts: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    tasks = sorted(
        (start_s, index, microbatch) for microbatch, row in enumerate(starts) for index, start_s in enumerate(row)
    )
    return [(microbatch, index) for _, index, microbatch in tasks]


def _in_waves(costs: SlotCosts, routes: Sequence[SlotRoute]) -> Iterator[tuple[int, int]]:
    """Yield GPipe's order: wave by wave all forwards, all losses, all backwards, each in order of number."""
    for wave in _waves(costs, routes):
        for phase in range(3):
            for microbatch in wave:
                length = len(routes[microbatch])
                bounds = (0, length, length + 1, 2 * length + 1)
                for index in range(bounds[phase], bounds[phase + 1]):
                    yield microbatch, index


def _waves(costs: SlotCosts, routes: Sequence[SlotRoute]) -> list[list[int]]:
    """Return the microbatches of each wave: each joins the first one in which every node of its route has room."""
    waves: list[list[int]] = []
    held: list[list[int]] = []
    first_open = [0] * len(costs.placement)
    """First wave in which a slot still has room."""
    for microbatch, route in enumerate(routes):
        wave = max(first_open[slot] for slot in route)
        while wave < len(waves) and any(held[wave][slot] >= costs.memory[slot] for slot in route):
            wave += 1
        if wave == len(waves):
            waves.append([])
            held.append([0] * len(costs.placement))
        waves[wave].append(microbatch)
        for slot in route:
            held[wave][slot] += 1
            while first_open[slot] < len(waves) and held[first_open[slot]][slot] >= costs.memory[slot]:
                first_open[slot] += 1
    return waves
