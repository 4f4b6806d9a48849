"""Routes to begin from, made by rules: evenly loaded ones, and cheap ones."""

import random
from collections.abc import Sequence
from math import ceil

import numpy as np
import numpy.typing as npt
from ortools.sat.python import cp_model

from skippipe_scheduler.problem.infeasibility import check_feasible
from skippipe_scheduler.problem.sequences.dealt_sequences import deal_sequences
from skippipe_scheduler.problem.sequences.sequence_flow import even_sequences
from skippipe_scheduler.slots.slot_model import SlotCosts, SlotModel, SlotRoute

SPARE_ROOM = 1.1
"""How many times its share of the visits a slot may get before it costs more. Chosen."""
CROWDING_COST = 100
"""What a visit beyond that costs, in the longest work of a visit. Chosen: more than any detour."""
SEQUENCES_EFFORT = 0.3
"""Units of CP-SAT's deterministic time to find few sequences with even coverage. Chosen."""
SEQUENCE_COSTS = (8, 12)
"""A sequence costs a random number between these, so that seeds differ in which few are used. Chosen."""


def balanced_routes(slot_model: SlotModel, seed: int) -> tuple[SlotRoute, ...]:
    """Return routes that cover the stages and load the slots evenly, whatever they cost.

    Each origin's microbatches go together as far as the even load allows, which makes groups of slots that share them.
    """
    rng = random.Random(seed)
    sequences = balanced_sequences(slot_model, seed)
    visits = [sum(stage in sequence for sequence in sequences) for stage in range(slot_model.problem.num_stages)]
    room = {
        slot: float(ceil(visits[stage] / len(slot_model.slots_of[stage])))
        for slot, stage in enumerate(slot_model.stage_of)
    }
    routes: list[SlotRoute] = []
    last: SlotRoute | None = None
    for origin, sequence in zip(slot_model.origins, sequences, strict=True):
        route = [origin]
        for stage in sequence[1:]:
            slots = list(slot_model.slots_of[stage])
            rng.shuffle(slots)
            kept = [slot for slot in slots if last and last[0] == origin and slot in last and room[slot] > 0]
            slot = kept[0] if kept else max(slots, key=lambda slot: room[slot])
            room[slot] -= 1
            route.append(slot)
        last = tuple(route)
        routes.append(last)
    return tuple(routes)


def priced_routes(
    costs: SlotCosts, seed: int, sequences: Sequence[tuple[int, ...]] | None = None
) -> tuple[SlotRoute, ...]:
    """Return routes that cover the stages evenly, each the cheapest along its stages through slots with room left.

    The origins take turns. A slot's room is its share of the visits of its stage by speed, a tenth more at most.
    `sequences` are those of the microbatches, `balanced_sequences` where not given.
    """
    slot_model = costs.slot_model
    sequences = list(sequences or balanced_sequences(slot_model, seed))
    rng = random.Random(seed)
    rng.shuffle(sequences)
    room = _rooms(costs, sequences)
    turn = sorted(
        range(len(slot_model.origins)),
        key=lambda microbatch: (_turn(slot_model.origins, microbatch), slot_model.origins[microbatch]),
    )
    hop_s = np.array(costs.transfer_s)
    hop_s = hop_s + hop_s.T
    work_s = np.array(costs.forward_s) + np.array(costs.backward_s)
    routes: list[SlotRoute] = [()] * len(slot_model.origins)
    for microbatch, sequence in zip(turn, sequences, strict=True):
        routes[microbatch] = _cheapest_with_room(
            slot_model, hop_s, work_s, slot_model.origins[microbatch], sequence, room
        )
        room[list(routes[microbatch])] -= 1
    return tuple(routes)


def _turn(origins: Sequence[int], microbatch: int) -> int:
    return microbatch - origins.index(origins[microbatch])


def _rooms(costs: SlotCosts, sequences: Sequence[tuple[int, ...]]) -> npt.NDArray[np.float64]:
    slot_model = costs.slot_model
    room = np.zeros(len(slot_model.stage_of))
    for stage, slots in enumerate(slot_model.slots_of):
        visits = sum(stage in sequence for sequence in sequences)
        speed = np.array([1 / (costs.forward_s[slot] + costs.backward_s[slot]) for slot in slots])
        room[list(slots)] = np.ceil(SPARE_ROOM * visits * speed / speed.sum())
    return room


def _cheapest_with_room(
    slot_model: SlotModel,
    hop_s: npt.NDArray[np.float64],
    work_s: npt.NDArray[np.float64],
    origin: int,
    sequence: tuple[int, ...],
    room: npt.NDArray[np.float64],
) -> SlotRoute:
    """Return the cheapest closed walk along `sequence`; a slot without room costs much, but is never forbidden."""
    crowded_s = np.where(room > 0, 0.0, CROWDING_COST * work_s.max() * (1 - room))
    length_s, slots, came_from = np.zeros(1), np.array([origin]), []
    for stage in sequence[1:]:
        here = np.array(slot_model.slots_of[stage])
        reached_s = length_s[:, None] + hop_s[np.ix_(slots, here)]
        came_from.append((slots, reached_s.argmin(axis=0)))
        length_s = reached_s.min(axis=0) + work_s[here] + crowded_s[here]
        slots = here
    last = int((length_s + hop_s[slots, origin]).argmin())
    route = [int(slots[last])]
    for before, choice in reversed(came_from):
        last = int(choice[last])
        route.append(int(before[last]))
    return tuple(reversed(route))


def balanced_sequences(slot_model: SlotModel, seed: int, *, few: bool = True) -> list[tuple[int, ...]]:
    """Return one stage sequence per microbatch with even coverage; raise `InfeasibleError` naming the rules that
    conflict where there are none.

    With `few`, about half a second goes into few different ones.
    """
    check_feasible(slot_model.problem)
    rules, total = slot_model.problem.rules, len(slot_model.origins)
    found = _few_sequences(slot_model, seed) if few else deal_sequences(rules, total, seed)
    found = found or even_sequences(rules, total, seed)
    if rules.route_lengths:
        random.Random(seed).shuffle(found)  # else the short ones would all go to the first origins
    return found


def _few_sequences(slot_model: SlotModel, seed: int) -> list[tuple[int, ...]] | None:
    """Return sequences with even coverage, few of them different, or None where those of the slot model have none."""
    model, solver, rng = cp_model.CpModel(), cp_model.CpSolver(), random.Random(seed)
    total = len(slot_model.origins)
    counts = [model.new_int_var(0, total, "") for _ in slot_model.sequences]
    for length, wanted in slot_model.problem.rules.length_counts(total).items():
        model.add(
            sum(v for v, stages in zip(counts, slot_model.sequences, strict=True) if len(stages) == length) == wanted
        )
    for stage, bounds in slot_model.limits.items():
        visits = sum(v for v, sequence in zip(counts, slot_model.sequences, strict=True) if stage in sequence)
        model.add_linear_constraint(visits, *bounds)
    used = [model.new_bool_var("") for _ in counts]
    for count, flag in zip(counts, used, strict=True):
        model.add(count <= total * flag)
    model.minimize(sum(flag * rng.randint(*SEQUENCE_COSTS) for flag in used))
    solver.parameters.num_workers = 1
    solver.parameters.catch_sigint_signal = False
    solver.parameters.random_seed = seed % 2**31
    solver.parameters.max_deterministic_time = SEQUENCES_EFFORT
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    return [
        sequence
        for sequence, count in zip(slot_model.sequences, counts, strict=True)
        for _ in range(solver.value(count))
    ]
