"""The route program: which routes the microbatches take, as a linear program over all legal routes, against the time
for which the nodes can hold and work.

For an iteration of T + t seconds (T given), of which a node is idle for `head` at the start and `tail` at the end,

    minimise t >= 0 such that
    per node     sum over its routes of (residence + overhead) <= window(T - head - tail) + memory * t    (Little's law)
    per node     sum over its routes of (forward + backward + overheads) <= T - head - tail + overhead + t
    per origin   its number of microbatches;  per stage its coverage;  per length its number of routes

Where the placement is free, a node is an origin by a share y in [0, 1] and another stage by 1 - y, and has these
shares of both windows. Multipliers of the rows that are not negative, and whose weights of t add up to at most 1, prove
that t is at least the value of the program relaxed by them (Lagrangian duality), in which every origin uses its
cheapest route alone. They come from the program over the routes found so far (column generation). T is raised with the
bound, because windows are tighter nearer the truth. Every round proves its bound, however early the program ends.
"""

import math
from dataclasses import dataclass

import numpy as np

from skippipe_scheduler.bounds.network import Mask, Matrix, Network, Vector
from skippipe_scheduler.bounds.route_program.pricing import Prices
from skippipe_scheduler.bounds.walks import Idle
from skippipe_scheduler.bounds.work import window_s


@dataclass(frozen=True)
class Capacity:
    """By class and node: the most seconds of holding (with overheads) and of work in an iteration of `within_s`."""

    within_s: float
    holding_s: Matrix
    work_s: Matrix


@dataclass(frozen=True)
class Multipliers:
    """Of the rows: holding and work by class and node, coverage by class, routes by length."""

    holding: Matrix
    work: Matrix
    coverage: Vector
    length: dict[int, float]


def capacity_within(network: Network, idle: Idle, within_s: float) -> Capacity:
    """Return how much nodes can hold and do in an iteration of `within_s`."""
    holding_s, work_s = np.zeros_like(idle.head_s), np.zeros_like(idle.head_s)
    for stage, nodes in enumerate(network.nodes_of):
        for node in nodes:
            open_s = within_s - float(idle.head_s[stage, node] + idle.tail_s[stage, node])
            if open_s > 0:
                staggered_s = float(network.work_s[stage][node]) + 2 * network.overhead_s
                holding_s[stage, node] = window_s(int(network.memory[node]), staggered_s, network.overhead_s, open_s)
                work_s[stage, node] = open_s + network.overhead_s
    return Capacity(within_s, holding_s, work_s)


@dataclass(frozen=True)
class OriginChoice:
    """Of a free placement: the candidates that must be origins, and those that must not."""

    required: Mask
    barred: Mask


def equal_multipliers(network: Network) -> Multipliers:
    """Return multipliers to begin with: holding costs the same everywhere."""
    holding = np.zeros((len(network.nodes_of), len(network.problem.nodes)))
    for stage, nodes in enumerate(network.nodes_of):
        holding[stage, nodes] = 1.0
    share = holding / float((holding * network.memory).sum())
    lengths = dict.fromkeys(network.problem.rules.lengths, 0.0)
    return Multipliers(share, np.zeros_like(share), np.zeros(len(share)), lengths)


def prices(network: Network, multipliers: Multipliers) -> Prices:
    """Return what routes cost under the multipliers."""
    visit = multipliers.holding * network.overhead_s + multipliers.work * network.visit_s
    visit -= multipliers.coverage[:, None]
    return Prices(multipliers.holding, visit, {length: -price for length, price in multipliers.length.items()})


def lagrangian_bound_s(
    network: Network, capacity: Capacity, multipliers: Multipliers, choice: OriginChoice, cheapest: Vector
) -> float:
    """Return the value of the relaxed program, where `cheapest` bounds the cost of each origin's routes."""
    low, high = np.array(network.slot_model.coverage[: len(multipliers.coverage)]).T
    counts = network.problem.rules.length_counts(network.num_microbatches)
    total = float(np.where(multipliers.coverage > 0, low, high) @ multipliers.coverage)
    total += sum(multipliers.length[length] * count for length, count in counts.items())
    room = multipliers.holding * capacity.holding_s + multipliers.work * capacity.work_s
    least = float(cheapest[~choice.barred].min(initial=np.inf))
    if network.fixed:
        total -= float(room.sum())
        if network.problem.free_origins:
            return total + network.num_microbatches * least
        return total + float(np.array(network.counts) @ cheapest)
    if math.isinf(least):
        return math.inf
    as_origin = network.least_count * (cheapest - least) - room[0] + room[1]
    open_to = np.sort(as_origin[~choice.required & ~choice.barred])
    more = network.problem.sizes[0] - int(choice.required.sum())
    if not 0 <= more <= len(open_to):
        return math.inf
    chosen = float(as_origin[choice.required].sum()) + float(open_to[:more].sum())
    return total + network.num_microbatches * least - float(room[1].sum()) + chosen


def explain_route_program(network: Network, bound_s: float) -> str:
    """Return what binds where the routes of all origins together do, and what would help."""
    return (
        f"No plan is shorter than {bound_s:.3g} s: whichever routes they take together, the microbatches of all "
        "origins fill the memory or the time of the nodes near them. More memory there, more near replicas or shorter "
        "routes would help."
    )
