"""The route program over the routes found so far (see `relaxation`), in OR-tools' simplex solver."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from ortools.linear_solver import pywraplp

from skippipe_scheduler.bounds.network import Network, Vector
from skippipe_scheduler.bounds.route_program.pricing import PricedRoute, residences_s
from skippipe_scheduler.bounds.route_program.relaxation import Capacity, Multipliers, OriginChoice
from skippipe_scheduler.budget import Budget

NodeAtStage = tuple[int, int]


class RestrictedMaster:
    """Rows for all nodes, columns for the known routes. Counts may be missed at a high price, so that a solution
    always exists.
    """

    def __init__(self, network: Network, price_s: float) -> None:
        self.network = network
        self.solver: Any = pywraplp.Solver.CreateSolver("GLOP")
        self.inf = self.solver.infinity()
        self.objective = self.solver.Objective()
        self.objective.SetMinimization()
        self.known: set[tuple[int, ...]] = set()
        self.places = [(stage, int(node)) for stage, nodes in enumerate(network.nodes_of) for node in nodes]
        self.more_s = self._column(1.0)
        self.holding = {place: self._row(-self.inf, 0.0, -float(network.memory[place[1]])) for place in self.places}
        self.work = {place: self._row(-self.inf, 0.0, -1.0) for place in self.places}
        self.coverage, self.length = self._add_coverage(), self._add_lengths()
        self.shares: list[Any] = []
        self.counts = self._add_origins()
        counted = [row for rows in self.counts for row in rows]
        for row in (*self.coverage.values(), *self.length.values(), *counted):
            for sign in (1.0, -1.0):
                row.SetCoefficient(self._column(price_s), sign)

    def _column(self, cost: float, upper: float | None = None) -> Any:
        variable = self.solver.NumVar(0.0, self.inf if upper is None else upper, "")
        self.objective.SetCoefficient(variable, cost)
        return variable

    def _row(self, low: float, high: float, more: float = 0.0) -> Any:
        row = self.solver.Constraint(low, high)
        row.SetCoefficient(self.more_s, more)
        return row

    def _add_coverage(self) -> dict[int, Any]:
        if not self.network.by_stage:
            return {}
        return {stage: self._row(*bounds) for stage, bounds in self.network.slot_model.limits.items()}

    def _add_lengths(self) -> dict[int, Any]:
        counts = self.network.problem.rules.length_counts(self.network.num_microbatches)
        return {length: self._row(count, count) for length, count in counts.items()}

    def _add_origins(self) -> list[tuple[Any, ...]]:
        """Add the rows that count each origin's microbatches; with a free placement as far as it is an origin."""
        network = self.network
        if network.problem.free_origins and network.fixed:
            return [() for _ in network.origins]
        if network.fixed:
            return [(self._row(count, count),) for count in network.counts]
        self.shares = [self._column(0.0, 1.0) for _ in network.origins]
        size = network.problem.sizes[0]
        chosen = self._row(size, size)
        rows = []
        for share in self.shares:
            chosen.SetCoefficient(share, 1.0)
            least, greatest = self._row(0.0, self.inf), self._row(-self.inf, 0.0)
            least.SetCoefficient(share, -float(network.least_count))
            greatest.SetCoefficient(share, -float(network.greatest_count))
            rows.append((least, greatest))
        return rows

    def add(self, routes: Iterable[PricedRoute]) -> int:
        """Add the routes that are new; return how many were."""
        network, before = self.network, len(self.known)
        for route in routes:
            key = (*route.classes, *route.nodes)
            if key in self.known:
                continue
            self.known.add(key)
            column = self._column(0.0)
            held_s = residences_s(network, route.origin, route.classes, route.nodes)
            visits: dict[NodeAtStage, list[float]] = {}
            for place, held_here_s in zip(zip(route.classes, route.nodes, strict=True), held_s, strict=True):
                visits.setdefault(place, []).append(held_here_s + network.overhead_s)
                if place[0] in self.coverage:
                    self.coverage[place[0]].SetCoefficient(column, 1.0)
            for place, times_s in visits.items():
                self.holding[place].SetCoefficient(column, sum(times_s))
                self.work[place].SetCoefficient(column, len(times_s) * float(network.visit_s[place]))
            self.length[len(route.nodes)].SetCoefficient(column, 1.0)
            for row in self.counts[route.origin]:
                row.SetCoefficient(column, 1.0)
        return len(self.known) - before

    def solve(
        self, capacity: Capacity, choice: OriginChoice, budget: Budget
    ) -> tuple[float, Multipliers, Vector] | None:
        """Return the least t over the known routes, its multipliers made valid for the relaxed program, and with a
        free placement the share of each candidate that is an origin. None where the solver fails numerically, which may
        be that it turns in circles until the budget is spent.
        """
        for share, required, barred in zip(self.shares, choice.required, choice.barred, strict=bool(self.shares)):
            share.SetBounds(float(required), float(not barred))
        for place in self.places:
            self._set_room(self.holding[place], place, float(capacity.holding_s[place]))
            self._set_room(self.work[place], place, float(capacity.work_s[place]))
        self.solver.SetTimeLimit(max(1, int(1000 * budget.left_s)))
        if self.solver.Solve() != pywraplp.Solver.OPTIMAL:
            return None
        shape = (len(self.network.nodes_of), len(self.network.problem.nodes))
        holding, work, coverage = np.zeros(shape), np.zeros(shape), np.zeros(shape[0])
        for place in self.places:
            holding[place] = max(0.0, -self.holding[place].dual_value())
            work[place] = max(0.0, -self.work[place].dual_value())
        for stage, row in self.coverage.items():
            coverage[stage] = row.dual_value()
        weight = max(1.0, float((holding * self.network.memory).sum() + work.sum()))
        length = {stages: row.dual_value() / weight for stages, row in self.length.items()}
        multipliers = Multipliers(holding / weight, work / weight, coverage / weight, length)
        shares = np.array([share.solution_value() for share in self.shares])
        return float(self.objective.Value()), multipliers, shares

    def _set_room(self, row: Any, place: NodeAtStage, room_s: float) -> None:
        """Set a right-hand side; with a free placement an origin has the share y of it, another stage 1 - y."""
        if not self.shares:
            row.SetUb(room_s)
            return
        stage, node = place
        row.SetUb(room_s if stage else 0.0)
        row.SetCoefficient(self.shares[node], room_s if stage else -room_s)
