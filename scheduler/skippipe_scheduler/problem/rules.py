"""Which sequences of stages a route may take (SkipPipe's convergence constraints, made exact in docs/plan-file.md).

A visit is *late* when a higher stage was visited before it; its distance is the number of such stages.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from skippipe_scheduler.problem.problem import Rules


def stage_sequences(rules: Rules) -> Iterator[tuple[int, ...]]:
    """Yield every legal sequence of stages in lexicographic order (depth first, pruned)."""
    lengths, protected = rules.lengths, frozenset(rules.protected_stages)

    def extend(sequence: tuple[int, ...], swaps: int) -> Iterator[tuple[int, ...]]:
        missing = len(protected.difference(sequence))
        if len(sequence) in lengths and not missing:
            yield sequence
        if len(sequence) + max(1, missing) > rules.route_length:
            return
        frontier = max(sequence)
        for stage in range(1, min(rules.num_stages, frontier + rules.max_forward_jump + 1)):
            if stage in sequence:
                continue
            distance = sum(visited > stage for visited in sequence)
            late = swaps + (distance > 0)
            if distance <= rules.max_swap_distance and late <= rules.max_swaps:
                yield from extend((*sequence, stage), late)

    return extend((0,), 0)


def legal_stage_sequences(rules: Rules) -> tuple[tuple[int, ...], ...]:
    """Return every legal sequence of stages, sorted. Their number grows fast beyond about eight stages."""
    return tuple(stage_sequences(rules))


def sample_sequences(rules: Rules, count: int = 300) -> tuple[tuple[int, ...], ...]:
    """Return up to `count` legal sequences without swaps of every length; together they visit all stages about equally.

    For rules that allow too many sequences to list. The draws are always the same.
    """
    generator = random.Random(0)
    found: dict[tuple[int, ...], None] = {}
    for length in rules.lengths:
        visits = [0.0] * rules.num_stages
        for _ in range(count):
            weights = [visit + generator.random() for visit in visits]
            for stage in rules.protected_stages:
                weights[stage] -= 2 * sum(visits) + rules.num_stages  # so that no other stages make up for it
            sequence = _least_visited(rules, length, weights)
            if sequence is None or not set(rules.protected_stages) <= {*sequence}:
                break
            found[sequence] = None
            for stage in sequence:
                visits[stage] += 1
    return tuple(sorted(found))


def _least_visited(rules: Rules, length: int, weights: Sequence[float]) -> tuple[int, ...] | None:
    """Return the ascending legal sequence of least total weight, by dynamic programming over its last stage."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for _ in range(length - 1):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for last, (weight, sequence) in best.items():
            for stage in range(last + 1, min(rules.num_stages, last + rules.max_forward_jump + 1)):
                total = weight + weights[stage]
                if stage not in longer or total < longer[stage][0]:
                    longer[stage] = (total, (*sequence, stage))
        best = longer
    return min(best.values())[1] if best else None


def first_offence(sequence: Sequence[int], rules: Rules) -> str | None:
    """Return which rule `sequence` breaks, in words, or None where it is legal."""
    if len(sequence) not in rules.lengths:
        wanted = (
            f"route_lengths are {list(rules.lengths)}"
            if rules.route_lengths
            else f"route_length is {rules.route_length}"
        )
        return f"visits {len(sequence)} stages, {wanted}"
    unknown = [stage for stage in sequence if not 0 <= stage < rules.num_stages]
    if unknown:
        return f"visits stage {unknown[0]}, there are {rules.num_stages}"
    twice = [stage for stage, times in Counter(sequence).items() if times > 1]
    if twice:
        return f"visits stage {twice[0]} twice"
    if sequence[0] != 0:
        return f"starts at stage {sequence[0]}, not at stage 0"
    left_out = set(rules.protected_stages).difference(sequence)
    if left_out:
        return f"leaves out stage {min(left_out)}, protected_stages are {list(rules.protected_stages)}"
    return _offence_against_order(sequence, rules)


def _offence_against_order(sequence: Sequence[int], rules: Rules) -> str | None:
    swaps = 0
    for position in range(1, len(sequence)):
        stage, before = sequence[position], sequence[:position]
        frontier = max(before)
        if stage > frontier + rules.max_forward_jump:
            return (
                f"jumps from stage {frontier} to {stage}, {stage - frontier} past the furthest visited; "
                f"max_forward_jump is {rules.max_forward_jump}"
            )
        distance = sum(visited > stage for visited in before)
        if distance > rules.max_swap_distance:
            return f"visits stage {stage} after {distance} higher ones, max_swap_distance is {rules.max_swap_distance}"
        swaps += distance > 0
    if swaps > rules.max_swaps:
        return f"has {swaps} swaps, max_swaps is {rules.max_swaps}"
    return None


def length_offence(lengths: Iterable[int], rules: Rules) -> str | None:
    """Return how the `lengths` of all routes differ from the mix that the rules ask for, or None."""
    found = Counter(lengths)
    for length, wanted in rules.length_counts(found.total()).items():
        if found[length] != wanted:
            return f"{found[length]} of {found.total()} routes visit {length} stages; route_lengths asks for {wanted}"
    return None


def coverage_offence(visits: Sequence[int], rules: Rules) -> str | None:
    """Return how `visits` (microbatches per stage) break uniform coverage, or None where they do not."""
    if not rules.uniform_coverage or not rules.shared_stages:
        return None
    most, least = (end(rules.shared_stages, key=lambda stage: visits[stage]) for end in (max, min))
    if visits[most] - visits[least] <= 1:
        return None
    return (
        f"stage {most} is visited by {visits[most]} microbatches and stage {least} by {visits[least]}; "
        "uniform_coverage allows a difference of one"
    )
