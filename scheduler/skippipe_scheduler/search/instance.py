"""A problem and a solution as the arrays of the compiled kernel."""

from collections.abc import Sequence

import numpy as np

from skippipe_scheduler.options import Robustness
from skippipe_scheduler.search.kernel.arrays import (
    BUSY,
    CONTENTION,
    GBIT_PER_S,
    INDEX_BITS,
    LATENCY_S,
    NOBODY,
    OCCUPANCY_S,
    REDUCTION,
    TRANSFER_S,
    Floats,
    Instance,
    Schedule,
    Sharing,
    make_sharing,
)
from skippipe_scheduler.slots.slot_model import SlotModel
from skippipe_scheduler.slots.solution import Starts


def make_instance(slot_model: SlotModel, robustness: Robustness | None, jitter_factors: int) -> Instance:
    """Return the problem as arrays, with so many random factors for each sample of `robustness`."""
    problem, costs, rules = slot_model.problem, slot_model.problem.costs, slot_model.problem.rules
    names = problem.nodes
    tables = (costs.forward_s, costs.backward_s, costs.loss_s)
    links = np.zeros((4, len(names), len(names)))
    links[TRANSFER_S] = slot_model.transfer_s
    links[LATENCY_S] = slot_model.latency_s
    links[GBIT_PER_S] = slot_model.gbit_per_s if costs.gbit_per_s else 1.0 - np.eye(len(names))
    if costs.contention != "none":
        for rank, source in enumerate(names):
            others = [sink for sink in names if sink != source]
            links[OCCUPANCY_S, rank, np.arange(len(names)) != rank] = [costs.occupancy_s(source, s) for s in others]
    fixed_s, gbit = _reductions(slot_model)
    return Instance(
        node_s=np.array([[table[name] for name in names] for table in tables]),
        memory=np.array([costs.memory[name] for name in names]),
        pinned=np.array(slot_model.pinned),
        region_of=np.unique(problem.regions or [""] * len(names), return_inverse=True)[1],
        links=links,
        stages=np.array([problem.stage_weight, fixed_s, gbit]),
        stage_of=np.array(slot_model.stage_of),
        first_slot=np.concatenate([[0], np.cumsum(problem.sizes)]),
        visits=np.array(slot_model.coverage).T.copy(),
        factors=_factors(robustness, jitter_factors),
        overhead_s=costs.task_overhead_s,
        contention=CONTENTION[costs.contention],
        reduction=REDUCTION[problem.reduction],
        max_swaps=rules.max_swaps,
        max_swap_distance=rules.max_swap_distance,
        max_forward_jump=rules.max_forward_jump,
        free_origins=problem.free_origins,
    )


def sharing_of(slot_model: SlotModel) -> Sharing:
    """Return memory for transfers of the problem that share cards and uplinks."""
    problem, costs = slot_model.problem, slot_model.problem.costs
    slots = len(slot_model.stage_of)
    if costs.contention != "shared":
        return make_sharing(np.zeros((0, 0), np.int64), np.zeros(0), 0, slots)
    cards, uplinks = costs.card_gbit_per_s or {}, costs.uplinks or ()
    behind = [[number for number, uplink in enumerate(uplinks) if node in uplink.nodes] for node in problem.nodes]
    uplinks_of = np.full((len(behind), max(1, *map(len, behind))), NOBODY)
    for row, found in zip(uplinks_of, behind, strict=True):
        row[: len(found)] = found
    capacity = [
        *(cards[node].up if node in cards else np.inf for node in problem.nodes),
        *(cards[node].down if node in cards else np.inf for node in problem.nodes),
        *(gbit_per_s for uplink in uplinks for gbit_per_s in (uplink.gbit_per_s.up, uplink.gbit_per_s.down)),
    ]
    return make_sharing(uplinks_of, np.array(capacity), problem.num_microbatches, slots)


def _reductions(slot_model: SlotModel) -> tuple[Sequence[float], Sequence[float]]:
    """Return fixed reduction seconds and, where they follow from the placement, gradient Gbit of every stage."""
    problem, costs = slot_model.problem, slot_model.problem.costs
    none = [0.0] * problem.num_stages
    if costs.reduce_s is not None:
        return costs.reduce_s, none
    if problem.stage_bytes is None or costs.latency_s is None or costs.gbit_per_s is None:
        return none, none
    return none, problem.stage_gbit


def _factors(robustness: Robustness | None, count: int) -> Floats:
    if robustness is None or robustness.sigma == 0:
        return np.zeros((0, 1))
    drawn = np.random.default_rng(0).normal(0.0, robustness.sigma, (robustness.samples, count))
    return np.exp(drawn)


def fill_schedule(schedule: Schedule, starts: Starts) -> None:
    """Put all tasks into an empty schedule in the order of `starts`."""
    rows: list[list[tuple[float, bool, int, int]]] = [[] for _ in schedule.placement]
    for m, row in enumerate(starts):
        if not row:
            continue
        route = schedule.routes[m, : schedule.lengths[m]].tolist()
        for index, slot in enumerate((*route, route[0], *reversed(route))):
            # A loss may take no time: then it comes before the task that starts with it.
            rows[slot].append((row[index], index != len(route), index, m << INDEX_BITS | index))
    for slot, entries in enumerate(rows):
        ordered = [task for *_, task in sorted(entries)]
        schedule.tasks[BUSY, slot, : len(ordered)] = ordered
        schedule.counts[BUSY, slot] = len(ordered)
