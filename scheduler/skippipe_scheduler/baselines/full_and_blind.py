"""What skipping is compared with: the full pipeline, and skipping that does not know the network."""

from itertools import combinations, islice

from skippipe_scheduler.errors import InfeasibleError
from skippipe_scheduler.problem.problem import Problem, pins_within
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.problem.stage_sizes import keeps_pins, resized, size_choices

MAX_SIZE_VARIANTS = 8
"""Choices of stages with one more replica that are raced. Chosen: more would leave each too little of the budget."""


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
    if nodes < stages:
        raise InfeasibleError(
            f"a full pipeline of {stages} stages needs {stages} nodes; there are {nodes}; "
            "use fewer stages or more nodes"
        )
    even, rest = divmod(nodes, stages)
    rules = full_pipeline_rules(problem.rules)
    variants = [
        tuple(even + (stage in extra) for stage in range(stages)) for extra in combinations(range(stages), rest)
    ]
    pinned = problem.pinned or {}
    variants = [sizes for sizes in variants if keeps_pins(problem, sizes)] or variants
    if len(variants) > MAX_SIZE_VARIANTS:
        step = len(variants) // MAX_SIZE_VARIANTS
        variants = list(islice(variants[::step], MAX_SIZE_VARIANTS))
    if sizes_by_memory:
        variants += [sizes for sizes in size_choices(nodes, rules)[1:] if keeps_pins(problem, sizes)]
    return [
        resized(problem, sizes).model_copy(update={"pinned": pins_within(pinned, sizes) or None, "rules": rules})
        for sizes in dict.fromkeys(variants)
    ]


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
        }
    )
    return problem.model_copy(update={"costs": blind, "published": None})
