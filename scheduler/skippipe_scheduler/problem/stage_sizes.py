"""How many replicas each stage gets: between equal shares of the work and equal shares of the memory.

By `workload.stage_sizes` every node runs as many tasks. But a node holds a microbatch from its forward to its backward,
an origin for the whole round trip and the last stage of a route for a moment. Where memory limits a plan (Little's law)
early stages want more replicas. Which of the two counts depends on the network, so the sizes between are raced.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from skippipe_scheduler.errors import InfeasibleError
from skippipe_scheduler.problem.problem import EvenMicrobatches, Problem, open_stages, pins_within
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.problem.workload import stage_sizes

_PARTS = (1 / 3, 2 / 3, 1.0)
"""Of memory in the shares; none is the rule of equal work. Chosen: so many sizes can be raced."""

StageSizes = tuple[int, ...]


def size_choices(num_nodes: int, rules: Rules) -> list[StageSizes]:
    """Return the sizes of stages that are worth a try, all different, those of equal work first.

    Hops are taken for equally long: then the time for which the k-th of P nodes on a route holds a microbatch is in
    proportion to P - k. Raises `InfeasibleError` with fewer nodes than stages.
    """
    mean = _mean_length(rules)
    work = _shares([_visits(rules, stage, mean) for stage in range(rules.num_stages)])
    held = _shares([visits * (mean - _hop(rules, stage, mean)) for stage, visits in enumerate(work)])
    choices = [stage_sizes(num_nodes, rules.num_stages, mean, rules.protected_stages)]
    for part in _PARTS:
        shares = [part * of_memory + (1 - part) * of_work for of_memory, of_work in zip(held, work, strict=True)]
        choices.append(whole_shares(shares, num_nodes))
    return list(dict.fromkeys(choices))


def size_variants(problem: Problem) -> list[Problem]:
    """Return the problem with each choice of sizes under which all its pins fit, or as it is where its placement is
    given. The number of microbatches stays.
    """
    if problem.stages is not None:
        return [problem]
    choices = [sizes for sizes in size_choices(len(problem.nodes), problem.rules) if keeps_pins(problem, sizes)]
    return [resized(problem, sizes) for sizes in dict.fromkeys([problem.sizes, *choices])]


def resized(problem: Problem, sizes: StageSizes) -> Problem:
    """Return the problem with other sizes, its placement free; as many microbatches, shared evenly where origins have
    given numbers.
    """
    given = problem.microbatches_per_origin
    return problem.model_copy(
        update={
            "stages": None,
            "stage_sizes": sizes,
            "microbatches_per_origin": given
            if problem.free_origins
            else EvenMicrobatches(even=problem.num_microbatches),
            "published": None,
        }
    )


def keeps_pins(problem: Problem, sizes: StageSizes) -> bool:
    """Return whether all pins fit and no stage opens to free nodes, whose memory may not suffice for it."""
    pinned = problem.pinned or {}
    return pins_within(pinned, sizes) == pinned and open_stages(pinned, sizes) <= open_stages(pinned, problem.sizes)


def with_room_for_pins(sizes: StageSizes, pinned: Mapping[str, int]) -> StageSizes:
    """Return the sizes, with more replicas where more nodes are pinned, taken from where most are free, the last first.

    Where no sizes have room for all pins, they are as they were.
    """
    pins = Counter(pinned.values())
    least = [max(1, pins[stage]) for stage in range(len(sizes))]
    if sum(least) > sum(sizes):
        return sizes
    roomy = [max(size, needed) for size, needed in zip(sizes, least, strict=True)]
    while sum(roomy) > sum(sizes):
        roomy[max(range(len(roomy)), key=lambda stage: (roomy[stage] - least[stage], stage))] -= 1
    return tuple(roomy)


def even_sizes(num_nodes: int, num_stages: int) -> StageSizes:
    """Return sizes as even as possible, the first stages those with one more; raise `InfeasibleError` with too few."""
    even, rest = divmod(num_nodes, num_stages)
    if even == 0:
        raise InfeasibleError(
            f"a full pipeline of {num_stages} stages needs {num_stages} nodes; there are {num_nodes}; "
            "use fewer stages or more nodes"
        )
    return tuple(even + (stage < rest) for stage in range(num_stages))


def least_sizes(choices: Sequence[StageSizes]) -> StageSizes:
    """Return the fewest replicas that each stage has in any of the choices."""
    return tuple(min(sizes) for sizes in zip(*choices, strict=True))


def _mean_length(rules: Rules) -> float:
    shares = rules.route_lengths or {rules.route_length: 1}
    return sum(length * share for length, share in shares.items()) / sum(shares.values())


def _visits(rules: Rules, stage: int, mean_length: float) -> float:
    """Return the share of the microbatches that visit a stage."""
    if stage not in rules.shared_stages:
        return 1.0
    return (mean_length - 1 - len(rules.protected_stages)) / len(rules.shared_stages)


def _hop(rules: Rules, stage: int, mean_length: float) -> float:
    """Return where on a route a stage comes, if it is on it: between 0 and the mean length less one."""
    return 0.0 if stage == 0 else 1 + (stage - 1) * (mean_length - 2) / max(1, rules.num_stages - 2)


def _shares(weights: Sequence[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def whole_shares(shares: Sequence[float], total: int) -> StageSizes:
    """Divide `total` by shares, at least 1 each, rests to the largest remainders."""
    spare = [share * total for share in shares]
    sizes = [max(1, int(share)) for share in spare]
    while sum(sizes) != total:
        step = 1 if sum(sizes) < total else -1
        open_to = [stage for stage, size in enumerate(sizes) if size + step >= 1]
        sizes[max(open_to, key=lambda stage: step * (spare[stage] - sizes[stage]))] += step
    return tuple(sizes)
