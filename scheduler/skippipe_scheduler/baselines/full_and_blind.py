"""What skipping is compared with: the full pipeline, and skipping that does not know the network."""

from collections.abc import Iterator
from itertools import combinations, islice
from math import comb

from skippipe_scheduler.problem.problem import Problem, pins_within
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.problem.stage_sizes import even_sizes, keeps_pins, resized, size_choices

MAX_SIZE_VARIANTS = 8
"""Choices of stages with one more replica that are raced. Chosen: more would leave each too little of the budget."""
_MOST_CHOICES = 20_000
"""Choices of these stages that are listed. Chosen: 40 stages and 60 nodes have more than 10^11."""


def full_pipeline_rules(rules: Rules) -> Rules:
    """Return `rules` for routes through all stages in order."""
    return rules.model_copy(
        update={
            "route_length": rules.num_stages,
            "route_lengths": None,
            "max_swaps": 0,
            "max_swap_distance": 0,
            "uniform_coverage": True,
        }
    )


def full_pipeline_problem(problem: Problem, *, sizes_by_memory: bool = False) -> list[Problem]:
    """Return full pipelines over the same nodes and microbatches, with a free placement, one per choice of
    sizes.

    Every microbatch visits every stage in order. Stage sizes are as even as possible; where nodes remain,
    every choice of stages that get one more (up to `MAX_SIZE_VARIANTS`). With `sizes_by_memory` also sizes with more
    replicas of the stages that hold microbatches longest. Pinned nodes stay, and so do free nodes
    that had no place at a stage; where no sizes allow it, only the first pins of each stage that fit stay. Raises
    `InfeasibleError` when there are fewer nodes than stages.
    """
    stages, nodes = problem.num_stages, len(problem.nodes)
    least = min(even_sizes(nodes, stages))
    rules = full_pipeline_rules(problem.rules)
    variants = [tuple(least + (stage in extra) for stage in range(stages)) for extra in _extras(stages, nodes % stages)]
    pinned = problem.pinned or {}
    variants = [sizes for sizes in variants if keeps_pins(problem, sizes)] or variants
    if len(variants) > MAX_SIZE_VARIANTS:
        step = len(variants) // MAX_SIZE_VARIANTS
        variants = list(islice(variants[::step], MAX_SIZE_VARIANTS))
    if sizes_by_memory:
        variants += [sizes for sizes in size_choices(nodes, rules)[1:] if keeps_pins(problem, sizes)]
    return [
        as_full_pipeline(resized(problem, sizes)).model_copy(update={"pinned": pins_within(pinned, sizes) or None})
        for sizes in dict.fromkeys(variants)
    ]


def as_full_pipeline(problem: Problem) -> Problem:
    """Return the problem with routes through all stages in order; sizes and pins stay."""
    return problem.model_copy(update={"rules": full_pipeline_rules(problem.rules)})


def _extras(stages: int, rest: int) -> Iterator[tuple[int, ...]]:
    """Yield choices of `rest` stages: all there are, or where these are too many the first, last and spread ones."""
    if comb(stages, rest) <= _MOST_CHOICES:
        yield from combinations(range(stages), rest)
        return
    yield tuple(range(rest))
    yield tuple(range(stages - rest, stages))
    for shift in range(MAX_SIZE_VARIANTS - 2):
        yield tuple(sorted((index * stages // rest + shift) % stages for index in range(rest)))


def network_blind(problem: Problem) -> Problem:
    """Return the problem as a planner sees it that measures neither links nor nodes: all alike, the mean
    task time.

    Links cost a small constant, so nothing but the rules and an even load tells routes apart.
    """
    costs, names = problem.costs, problem.nodes
    forward_s = sum(costs.forward_s[name] for name in names) / len(names)
    backward_s = sum(costs.backward_s[name] for name in names) / len(names)
    loss_s = sum(costs.loss_s[name] for name in names) / len(names)
    blind = costs.model_copy(
        update={
            "forward_s": dict.fromkeys(names, forward_s),
            "backward_s": dict.fromkeys(names, backward_s),
            "loss_s": dict.fromkeys(names, loss_s),
            "weight_s": None,
            "transfer_s": {source: {sink: 0.1 * forward_s for sink in names if sink != source} for source in names},
            "reduce_s": (0.0,) * problem.num_stages,
            "contention": "none",
            "card_gbit_per_s": None,
            "uplinks": None,
        }
    )
    return problem.model_copy(update={"costs": blind, "published": None})
