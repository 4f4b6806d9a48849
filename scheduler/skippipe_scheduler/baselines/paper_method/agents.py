"""Agents of the path search: microbatches that share an origin and a path.

In the paper (arXiv 2502.19913) an agent is an origin and one of its memory slots, and its path serves every wave; the
authors' code also joins the slots of an origin to save time. So agents here are groups of equal size, as coarse as
uniform coverage allows first, finer ones afterwards. Where origins start different numbers, or routes have several
lengths, which the paper does not know, every microbatch is an agent.
"""

import random
from dataclasses import dataclass
from math import ceil

from skippipe_scheduler.slots.slot_model import SlotCosts, SlotModel


@dataclass(frozen=True)
class Agent:
    """`size` microbatches that start at slot `origin` and visit `length` stages."""

    origin: int
    length: int
    size: int


@dataclass(frozen=True)
class Wave:
    """What an iteration's worth of agents may take: visits of each stage and of each slot, in microbatches.

    At most `full_stages` stages beside those protected may be visited `stage_cap` times, and no other stage more than
    once less.
    """

    stage_cap: int
    full_stages: int
    slot_caps: tuple[int, ...]
    num_waves: int


def groupings(slot_model: SlotModel, seed: int) -> list[tuple[Agent, ...]]:
    """Return the sets of agents to try, coarsest first; the last has one microbatch per agent."""
    problem, rules = slot_model.problem, slot_model.problem.rules
    counts = problem.microbatches_of_origins()
    lengths = [n for n, count in rules.length_counts(len(slot_model.origins)).items() for _ in range(count)]
    random.Random(seed).shuffle(lengths)
    single = tuple(Agent(origin, length, 1) for origin, length in zip(slot_model.origins, lengths, strict=True))
    if len(set(counts)) > 1 or len(rules.lengths) > 1 or problem.free_origins:
        return [single]
    found = []
    for size in range(counts[0], 1, -1):
        agents = tuple(
            Agent(origin, rules.route_length, size)
            for origin in slot_model.slots_of[0]
            for _ in range(counts[0] // size)
        )
        visits = len(agents) * (rules.route_length - 1 - len(rules.protected_stages))
        balanced = visits % (len(rules.shared_stages) or 1) == 0
        if counts[0] % size == 0 and (balanced or not rules.uniform_coverage):
            found.append(agents)
    return [*found, single]


def wave_of(costs: SlotCosts, agents: tuple[Agent, ...]) -> Wave:
    """Return the limits of the paper's constraints: uniform coverage, and memory over the waves of an iteration.

    A slot serves at most its memory in each wave; there are as many waves as the busiest origin needs, and
    at least as many as give every stage room for its visits.
    """
    slot_model = costs.slot_model
    rules, total = slot_model.problem.rules, sum(agent.size for agent in agents)
    visits = sum(agent.size * (agent.length - 1 - len(rules.protected_stages)) for agent in agents)
    shared = len(rules.shared_stages)
    low, high = slot_model.coverage[rules.shared_stages[0]] if shared else (total, total)
    full = visits - low * shared if rules.uniform_coverage and high > low else shared
    starts = [0] * len(slot_model.stage_of)
    for agent in agents:
        starts[agent.origin] += agent.size
    waves = [ceil(starts[slot] / costs.memory[slot]) for slot in slot_model.slots_of[0]]
    visits_of = [
        ceil(visits / shared) if stage in rules.shared_stages else total for stage in range(1, rules.num_stages)
    ]
    rooms = [
        ceil(visits_here / sum(costs.memory[slot] for slot in slots))
        for visits_here, slots in zip(visits_of, slot_model.slots_of[1:], strict=True)
    ]
    num_waves = max(*waves, *rooms, 1)
    caps = tuple(num_waves * memory for memory in costs.memory)
    return Wave(high, full, caps, num_waves)
