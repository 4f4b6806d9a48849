"""The joint model: routes and order together, for one placement, as intervals in CP-SAT.

Times are whole units rounded down, and reductions take what the best order of replicas may, so the model is a
relaxation: its bound is valid, also where links are shared. An order read from it is timed again exactly before anyone
believes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import floor
from typing import Any

from ortools.sat.python import cp_model

from skippipe_scheduler.budget import Budget
from skippipe_scheduler.search.tuning import JOINT_MODEL
from skippipe_scheduler.slots.candidate_routes import count_routes, list_routes
from skippipe_scheduler.slots.least_reductions import least_reductions_s
from skippipe_scheduler.slots.slot_model import SlotCosts, SlotModel, SlotRoute
from skippipe_scheduler.slots.solution import Solution, Starts


@dataclass(frozen=True)
class JointResult:
    """Routes and starts in seconds (None if none were found), a lower bound for this placement, in seconds."""

    routes: tuple[SlotRoute, ...] | None
    starts: Starts
    bound_s: float


def is_small_enough(slot_model: SlotModel) -> bool:
    """Return whether the problem is small enough for the joint model, with one route length and even origins."""
    if slot_model.problem.free_origins or slot_model.problem.rules.route_lengths is not None:
        return False
    most_choices = JOINT_MODEL.most_choices * len(slot_model.slots_of[0])  # a microbatch has the routes of one origin
    return slot_model.lists_all_sequences and count_routes(slot_model) * len(slot_model.origins) <= most_choices


def solve_joint_model(
    slot_model: SlotModel,
    solution: Solution,
    known: Sequence[SlotRoute],
    budget: Budget,
    seed: int,
    num_workers: int,
    *,
    part: float,
    at_most_s: float,
) -> JointResult | None:
    """Solve the joint model from the hint of `solution`: over all routes where it `is_small_enough`, else over `known`.

    The bound is then 0, because it would hold for the known routes alone. None where these are none, too many, or
    differ in length.
    """
    whole = is_small_enough(slot_model)
    if not whole and (not known or slot_model.problem.rules.route_lengths is not None):
        return None
    costs = SlotCosts(slot_model, solution.placement)
    if whole:
        routes = list_routes(costs, seed, JOINT_MODEL.most_choices).routes
    else:
        routes = tuple(dict.fromkeys((*solution.routes, *known)))
    by_origin = {origin: [route for route in routes if route[0] == origin] for origin in slot_model.slots_of[0]}
    if sum(len(by_origin[route[0]]) for route in solution.routes) > JOINT_MODEL.most_choices:
        return None
    model = _JointModel(costs, solution, by_origin)
    solver = cp_model.CpSolver()
    tuning = JOINT_MODEL
    least = tuning.small_effort if slot_model.num_tasks <= tuning.small_tasks else tuning.large_effort
    budget.configure(solver, seed, num_workers, part, at_most_s, least)
    status = budget.run(solver, model.model)
    bound_s = max(0.0, solver.best_objective_bound) * model.unit_s if whole else 0.0
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return JointResult(None, (), bound_s)
    routes, starts = model.read(solver)
    return JointResult(routes, starts, bound_s)


class _JointModel:
    """Per microbatch 2P+1 starts shared by all its routes, one literal per route, intervals present with
    them.
    """

    def __init__(self, costs: SlotCosts, solution: Solution, by_origin: dict[int, list[SlotRoute]]) -> None:
        self.model = cp_model.CpModel()
        self.costs = costs
        self.solution = solution
        slot_model = costs.slot_model
        self.reduce_s = least_reductions_s(slot_model.problem, slot_model.stages(costs.placement))
        self.unit_s = solution.iteration_s / JOINT_MODEL.units
        self.horizon = JOINT_MODEL.units + 1
        slots = range(len(costs.placement))
        self.busy: list[list[Any]] = [[] for _ in slots]
        self.held: list[list[Any]] = [[] for _ in slots]
        self.visits: list[list[Any]] = [[] for _ in slots]
        self.makespan = self.model.new_int_var(0, self.horizon, "iteration")
        self.starts: list[list[Any]] = []
        self.choices: list[dict[SlotRoute, Any]] = []
        for microbatch in range(len(solution.routes)):
            self._add_microbatch(microbatch, by_origin[solution.routes[microbatch][0]])
        for slot in slots:
            self.model.add_no_overlap(self.busy[slot])
            if len(self.held[slot]) > costs.memory[slot]:
                self.model.add_cumulative(self.held[slot], [1] * len(self.held[slot]), costs.memory[slot])
        self._balance()
        self._break_symmetry()
        self.model.minimize(self.makespan)

    def _units(self, seconds: float) -> int:
        return floor(seconds / self.unit_s * (1 - 1e-12))

    def _add_microbatch(self, microbatch: int, routes: list[SlotRoute]) -> None:
        model, costs, hint = self.model, self.costs, self.solution.routes[microbatch]
        length = len(hint)
        starts = [model.new_int_var(0, self.horizon, "") for _ in range(2 * length + 1)]
        choice = {route: model.new_bool_var("") for route in routes}
        model.add_exactly_one(choice.values())
        for start, value_s in zip(starts, self.solution.starts[microbatch], strict=True):
            model.add_hint(start, round(value_s / self.unit_s))
        for route, literal in choice.items():
            model.add_hint(literal, route == hint)
        chains = {route: costs.chain(route) for route in routes}
        for index in range(2 * length):
            step = sum(
                literal * self._units(chains[route].durations_s[index] + chains[route].delays_s[index])
                for route, literal in choice.items()
            )
            model.add(starts[index + 1] >= starts[index] + step)
        self._add_intervals(starts, choice, length)
        self.starts.append(starts)
        self.choices.append(choice)

    def _add_intervals(self, starts: list[Any], choice: dict[SlotRoute, Any], length: int) -> None:
        model, costs = self.model, self.costs
        overhead_s = costs.overhead_s
        for hop in range(length):
            forward, backward = starts[hop], starts[2 * length - hop]
            for slot in sorted({route[hop] for route in choice}):
                users = [literal for route, literal in choice.items() if route[hop] == slot]
                present = users[0] if len(users) == 1 else model.new_bool_var("")
                if len(users) > 1:
                    model.add(sum(users) == present)
                for start, taken_s in (
                    (forward, costs.forward_s[slot] + overhead_s),
                    (backward, costs.backward_s[slot] + overhead_s),
                ):
                    size = self._units(taken_s)
                    self.busy[slot].append(model.new_optional_fixed_size_interval_var(start, size, present, ""))
                end = backward + self._units(costs.backward_s[slot])
                span = model.new_int_var(0, self.horizon, "")
                self.held[slot].append(model.new_optional_interval_var(forward, span, end, present, ""))
                self.visits[slot].append(present)
                reduce_s = self.reduce_s[costs.slot_model.stage_of[slot]]
                after = self._units(costs.backward_s[slot] + reduce_s)
                model.add(self.makespan >= backward + after).only_enforce_if(present)
        origin = next(iter(choice))[0]
        loss = self._units(costs.loss_s[origin] + overhead_s)
        self.busy[origin].append(model.new_fixed_size_interval_var(starts[length], loss, ""))

    def _balance(self) -> None:
        slot_model = self.costs.slot_model
        for stage, bounds in slot_model.limits.items():
            visits = sum(literal for slot in slot_model.slots_of[stage] for literal in self.visits[slot])
            self.model.add_linear_constraint(visits, *bounds)

    def _break_symmetry(self) -> None:
        """Microbatches of one origin start in the sequence in which the hint starts them."""
        origins: dict[int, list[int]] = {}
        for microbatch, route in enumerate(self.solution.routes):
            origins.setdefault(route[0], []).append(microbatch)
        for members in origins.values():
            members.sort(key=lambda microbatch: self.solution.starts[microbatch][0])
            for earlier, later in pairwise(members):
                self.model.add(self.starts[earlier][0] <= self.starts[later][0])

    def read(self, solver: Any) -> tuple[tuple[SlotRoute, ...], Starts]:
        """Return the chosen routes and starts in seconds."""
        routes = tuple(
            next(route for route, literal in choice.items() if solver.boolean_value(literal)) for choice in self.choices
        )
        return routes, tuple(tuple(solver.value(start) * self.unit_s for start in row) for row in self.starts)
