"""The order of a stage's replicas, which decides how its gradients travel: round a ring, or up and down a tree.

Replicas are alike for routes, so their order is free. Of few replicas all orders are tried. Else a short way round is
looked for: the nearest next, then exchanges of two replicas that shorten the reduction.
"""

import math
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import TypeVar

from skippipe_scheduler.problem.gradient_reduction import BY_ORDER, LinkSpeeds, Reduction, reduction_s
from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.slots.slot_model import SlotModel, SlotPlacement, SlotRoute

_Replica = TypeVar("_Replica")
_MOST_ORDERS = 120
"""Orders of which all are tried. Chosen: two milliseconds a stage."""
_EXCHANGED = 16
"""Replicas up to which exchanges are tried. Chosen: their number grows with the square."""


def order_replicas(slot_model: SlotModel, placement: SlotPlacement) -> SlotPlacement:
    """Return the placement with the replicas of each stage in an order that reduces their gradients fast."""
    ordered, problem = list(placement), slot_model.problem
    links = problem.reduction_links() if problem.reduction in BY_ORDER else None
    if links is None:
        return placement
    for stage, slots in enumerate(slot_model.slots_of):
        if len(slots) > 2:
            nodes = [placement[slot] for slot in slots]
            for slot, rank in zip(slots, _ordered(problem, links, stage, nodes), strict=True):
                ordered[slot] = rank
    return tuple(ordered)


def ordered_replicas(
    slot_model: SlotModel, placement: SlotPlacement, routes: Sequence[SlotRoute]
) -> tuple[SlotPlacement, list[SlotRoute]]:
    """Return placement and routes with each stage's replicas in a good order; routes follow their nodes."""
    ordered = order_replicas(slot_model, placement)
    slot_of = {rank: slot for slot, rank in enumerate(ordered)}
    return ordered, [tuple(slot_of[placement[slot]] for slot in route) for route in routes]


def all_orders(kind: Reduction, replicas: Sequence[_Replica]) -> list[list[_Replica]]:
    """Return all orders that make a difference to a reduction, none where they are many."""
    fixed = 1 if kind == "ring" else 0  # a ring is the same from each of its nodes
    if math.factorial(len(replicas) - fixed) > _MOST_ORDERS:
        return []
    return [[*replicas[:fixed], *rest] for rest in permutations(replicas[fixed:])]


def _ordered(problem: Problem, links: LinkSpeeds, stage: int, ranks: Sequence[int]) -> list[int]:
    names, gbit = problem.nodes, problem.stage_gbit[stage]
    message_gbit = gbit / len(ranks) if problem.reduction == "ring" else gbit

    def seconds(order: Sequence[int]) -> tuple[float, float]:
        """Return the reduction's seconds and, to tell equals apart, those of all its neighbours."""
        nodes = [names[rank] for rank in order]
        around = zip(nodes, [*nodes[1:], nodes[0]], strict=True)
        return reduction_s(problem.reduction, links, nodes, gbit), sum(
            links.message_s(*ends, message_gbit) for ends in around
        )

    def nearest_next(start: int) -> list[int]:
        order, left = [start], [rank for rank in ranks if rank != start]
        while left:
            here = names[order[-1]]
            order.append(min(left, key=lambda rank: (links.message_s(here, names[rank], message_gbit), rank)))
            left.remove(order[-1])
        return order

    orders = all_orders(problem.reduction, ranks)
    if orders:
        return min(orders, key=seconds)
    starts = ranks if len(ranks) <= _EXCHANGED else ranks[:1]
    best = min([[*ranks], *map(nearest_next, starts)], key=seconds)
    return _exchanged(best, seconds) if len(ranks) <= _EXCHANGED else best


def _exchanged(order: list[int], seconds: Callable[[Sequence[int]], tuple[float, float]]) -> list[int]:
    """Exchange two replicas, or turn the piece between them round, as long as that gains."""
    least, gained = seconds(order), True
    while gained:
        gained = False
        for first in range(len(order)):
            for last in range(first + 1, len(order)):
                exchanged, turned = [*order], [*order]
                exchanged[first], exchanged[last] = order[last], order[first]
                turned[first : last + 1] = order[first : last + 1][::-1]
                for changed in (exchanged, turned):
                    if seconds(changed) < least:
                        order, least, gained = changed, seconds(changed), True
    return order
