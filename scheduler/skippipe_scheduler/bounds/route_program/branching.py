"""Solving the route program (see `relaxation`): rounds of column generation and, where the placement is free,
branching on which nodes are origins.
"""

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from skippipe_scheduler.bounds.network import Mask, Network, Vector
from skippipe_scheduler.bounds.route_program.listed_routes import ListedRoutes
from skippipe_scheduler.bounds.route_program.pricing import PricedRoutes, Pricing
from skippipe_scheduler.bounds.route_program.relaxation import (
    Multipliers,
    OriginChoice,
    capacity_within,
    equal_multipliers,
    lagrangian_bound_s,
    prices,
)
from skippipe_scheduler.bounds.route_program.restricted_master import RestrictedMaster
from skippipe_scheduler.bounds.walks import Idle
from skippipe_scheduler.budget import Budget

MOST_STEPS = 1e6
"""Additions of a walk (see `Network.steps`) up to which the program is tried. Chosen: each round prices that often."""
MOST_ROUNDS = 300
"""Rounds of column generation on one branch. Chosen: it converges sooner or gains little."""
_ROUTES_AT_A_TIME = 12
"""Columns that each origin may add in a round. Chosen."""
_GAIN = 1e-4
"""Rounds end when the restricted master problem is within this share of the bound. Chosen."""
_UNDECIDED = 1e-4
"""A candidate whose share is nearer than this to 0 or 1 counts as decided. Chosen: the simplex method's rounding."""


@dataclass(frozen=True, order=True)
class _Branch:
    """Plans whose origins include those `required` and none of those `barred`; none is shorter than `bound_s`."""

    bound_s: float
    number: int
    required: Mask = field(compare=False)
    barred: Mask = field(compare=False)
    least_s: Vector = field(compare=False)
    """Of an iteration with each candidate as an origin beside those required."""
    multipliers: Multipliers = field(compare=False)
    shares: Vector = field(compare=False)
    """How far each candidate is an origin in the last program solved here."""

    @property
    def undecided(self) -> int | None:
        """The candidate to branch on: its share is nearest one half; None where all origins are required."""
        shares = np.where(self.required | self.barred, 0.0, self.shares)
        doubt = np.minimum(shares, 1.0 - shares)
        if doubt.max(initial=0.0) > _UNDECIDED:
            return int(doubt.argmax())
        return int(shares.argmax()) if shares.max(initial=0.0) > 0.5 else None


def route_program_s(
    network: Network,
    idle: Idle,
    known_s: float,
    least_beside_s: Callable[[Mask], Vector],
    listed: ListedRoutes | None,
    budget: Budget,
) -> float:
    """Return the bound of the route program, at least `known_s` (proven otherwise), found within the budget.

    `least_beside_s` returns the least time of an iteration with each candidate as an origin beside those given: with a
    free placement, only those can be origins for which it is at most T. Branches are taken in order of their bounds,
    and decide candidates until all origins are required. Nodes that are alike can be exchanged in any plan, so of
    those undecided in a branch only the first is tried as an origin: without it none of them is.
    """
    if network.steps > MOST_STEPS or not np.isfinite(known_s):
        return known_s
    rounds = _ColumnGeneration(network, idle, known_s, listed, budget)
    nobody = np.zeros(len(network.origins), dtype=bool)
    least_s = np.zeros(len(nobody)) if network.fixed else least_beside_s(nobody)
    root = _Branch(known_s, 0, nobody, nobody, least_s, equal_multipliers(network), np.zeros(len(nobody)))
    queue, closed_s = [rounds.solve(root)], math.inf
    numbers = itertools.count(1)
    while queue and queue[0].bound_s < closed_s and budget.left_s > 0:
        branch = heapq.heappop(queue)
        candidate = None if network.fixed else branch.undecided
        if candidate is None:
            closed_s = min(closed_s, branch.bound_s)
            continue
        alike = (network.alike == network.alike[candidate]) & ~branch.required & ~branch.barred
        required = branch.required.copy()
        required[alike.argmax()] = True
        least_s = least_beside_s(required)
        bound_s = max(branch.bound_s, float(least_s[required].max()))
        with_it = replace(branch, bound_s=bound_s, number=next(numbers), required=required, least_s=least_s)
        without = replace(branch, number=next(numbers), barred=branch.barred | alike)
        for part in (with_it, without):
            heapq.heappush(queue, rounds.solve(part))
    return min([closed_s, *(branch.bound_s for branch in queue)])


class _ColumnGeneration:
    """Column generation; the routes found for one branch serve the others."""

    def __init__(
        self, network: Network, idle: Idle, known_s: float, listed: ListedRoutes | None, budget: Budget
    ) -> None:
        self.network, self.idle, self.listed, self.budget = network, idle, listed, budget
        self.program = RestrictedMaster(network, known_s)

    def _price(self, multipliers: Multipliers) -> PricedRoutes:
        route_prices = prices(self.network, multipliers)
        return self.listed.price(route_prices) if self.listed else Pricing(self.network, route_prices)

    def solve(self, branch: _Branch) -> _Branch:
        """Return the branch with a better bound, multipliers that prove it, and the shares of its origins."""
        bound_s, multipliers, shares = branch.bound_s, branch.multipliers, branch.shares
        if math.isinf(bound_s):
            return branch
        for _ in range(MOST_ROUNDS):
            pricing = self._price(multipliers)
            gain_s = max(0.0, self._gain_s(branch, bound_s, multipliers, pricing))
            bound_s = min(bound_s + gain_s, self._next_s(branch, bound_s))
            if math.isinf(bound_s) or self.budget.left_s <= 0:
                break
            new: int = sum(
                self.program.add(pricing.routes(int(origin), _ROUTES_AT_A_TIME))
                for origin in np.flatnonzero(~self._choice(branch, bound_s).barred)
            )
            capacity = capacity_within(self.network, self.idle, bound_s)
            solved = self.program.solve(capacity, self._choice(branch, bound_s), self.budget)
            if solved is None:
                break
            more_s, multipliers, shares = solved
            if more_s < _GAIN * bound_s or not (new or gain_s):
                break
        return replace(branch, bound_s=bound_s, multipliers=multipliers, shares=shares)

    def _choice(self, branch: _Branch, bound_s: float) -> OriginChoice:
        return OriginChoice(branch.required, branch.barred | (branch.least_s > bound_s))

    def _next_s(self, branch: _Branch, bound_s: float) -> float:
        """Return the time from which on one candidate more can be an origin."""
        later = branch.least_s[~branch.barred & (branch.least_s > bound_s)]
        return float(later.min(initial=math.inf))

    def _gain_s(self, branch: _Branch, bound_s: float, multipliers: Multipliers, pricing: PricedRoutes) -> float:
        choice = self._choice(branch, bound_s)
        if (choice.required & choice.barred).any():
            return math.inf
        capacity = capacity_within(self.network, self.idle, bound_s)
        return lagrangian_bound_s(self.network, capacity, multipliers, choice, pricing.least())
