"""Routes around stages that nobody holds: the problem of the other stages, and its plan as one of all stages.

The planner solves a pipeline of the stages that are there, numbered anew; the plan file numbers them as before.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from skippipe_scheduler.errors import InfeasibleError
from skippipe_scheduler.plan.plan import Plan, PlanStage
from skippipe_scheduler.problem.rules import Rules, coverage_offence, first_offence, length_offence
from skippipe_scheduler.slots.routes import balanced_sequences
from skippipe_scheduler.slots.slot_model import SlotModel

NumberedRoute = tuple[int, ...]
"""Stages in the sequence in which a microbatch visits them."""


def rules_around(rules: Rules, absent: Sequence[int]) -> Rules:
    """Return the rules of a plan in which no route visits the `absent` stages.

    Routes are as long as before, or as long as there are stages left. Raises `InfeasibleError` where only stage 0 is.
    """
    left = rules.num_stages - len(absent)
    if left < 2:
        raise InfeasibleError("only stage 0 has nodes left, and a route visits two stages at least; bring nodes back")
    lengths: Counter[int] = Counter()
    for length, share in (rules.route_lengths or {}).items():
        lengths[min(length, left)] += share
    return rules.model_copy(
        update={
            "route_length": min(rules.route_length, left),
            "route_lengths": dict(lengths) or None,
            "protected_stages": tuple(stage for stage in rules.protected_stages if stage not in absent),
            "absent_stages": tuple(absent),
        }
    )


def renumbered_rules(around: Rules) -> Rules:
    """Return rules for the stages that are there alone, numbered anew, which allow nothing that `around` forbids.

    Jumps count the same. A swap over an absent stage is longer than it looks, so the distance may have to shrink.
    """
    absent = around.absent_stages or ()
    present = [stage for stage in range(around.num_stages) if stage not in absent]
    reach = range(min(around.max_swap_distance, len(present) - 1), 0, -1)
    distance = next(
        (
            numbers
            for numbers in reach
            if all(
                later - earlier <= around.max_swap_distance
                for earlier, later in zip(present[1:], present[1 + numbers :], strict=False)
            )
        ),
        0,
    )
    return around.model_copy(
        update={
            "num_stages": len(present),
            "max_swap_distance": distance,
            "protected_stages": tuple(present.index(stage) for stage in around.protected_stages),
            "absent_stages": None,
        }
    )


def routes_around(
    routes: Sequence[NumberedRoute], slot_model: SlotModel, number_of: Mapping[int, int], seed: int
) -> list[NumberedRoute]:
    """Return the routes without the absent stages, numbered anew by `number_of`, where that obeys the rules.

    Else each gets another sequence, with even coverage: of those that are left the one that has most in common with it.
    """
    rules = slot_model.problem.rules
    shorter = [tuple(number_of[stage] for stage in route if stage in number_of) for route in routes]
    visits = Counter(stage for route in shorter for stage in route)
    if not (
        any(first_offence(route, rules) for route in shorter)
        or coverage_offence([visits[stage] for stage in range(rules.num_stages)], rules)
        or length_offence(map(len, shorter), rules)
    ):
        return shorter
    left = Counter(balanced_sequences(slot_model, seed))
    dealt = []
    for route in shorter:
        chosen = max(left, key=lambda sequence: (len({*sequence}.intersection(route)), -len(sequence)))
        dealt.append(chosen)
        left[chosen] -= 1
        left += Counter()
    return dealt


def with_absent_stages(found: Plan, whole: Plan, around: Rules) -> Plan:
    """Return the plan of the stages that are there as one of all stages of `whole`, by the rules `around`."""
    absent = around.absent_stages or ()
    held = iter(found.stages)
    reduced_s = iter(found.costs.reduce_s or ())
    stages = [() if stage in absent else next(held).nodes for stage in range(around.num_stages)]
    reduce_s = [0.0 if stage in absent else next(reduced_s) for stage in range(around.num_stages)]
    return found.model_copy(
        update={
            "stages": tuple(
                PlanStage(layers=stage.layers, nodes=nodes) for stage, nodes in zip(whole.stages, stages, strict=True)
            ),
            "costs": found.costs.model_copy(update={"reduce_s": tuple(reduce_s)}),
            "rules": around,
        }
    )
