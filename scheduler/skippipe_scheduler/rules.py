"""Which sequences of stages a route may take (SkipPipe's convergence constraints, made exact in docs/plan-file.md).

A visit is *late* when a higher stage was visited before it; its distance is the number of such stages.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from skippipe_scheduler.problem import Rules


def stage_sequences(rules: Rules) -> Iterator[tuple[int, ...]]:
    """Yield every legal sequence of stages in lexicographic order (depth first, pruned)."""

    def extend(sequence: tuple[int, ...], swaps: int) -> Iterator[tuple[int, ...]]:
        if len(sequence) == rules.route_length:
            yield sequence
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


def first_offence(sequence: Sequence[int], rules: Rules) -> str | None:
    """Return which rule `sequence` breaks, in words, or None where it is legal."""
    if len(sequence) != rules.route_length:
        return f"visits {len(sequence)} stages, route_length is {rules.route_length}"
    unknown = [stage for stage in sequence if not 0 <= stage < rules.num_stages]
    if unknown:
        return f"visits stage {unknown[0]}, there are {rules.num_stages}"
    twice = [stage for stage, times in Counter(sequence).items() if times > 1]
    if twice:
        return f"visits stage {twice[0]} twice"
    if sequence[0] != 0:
        return f"starts at stage {sequence[0]}, not at stage 0"
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


def coverage_offence(visits: Sequence[int], rules: Rules) -> str | None:
    """Return how `visits` (microbatches per stage) break uniform coverage, or None where they do not."""
    others = list(visits[1:])
    if not rules.uniform_coverage or max(others) - min(others) <= 1:
        return None
    most, least = others.index(max(others)) + 1, others.index(min(others)) + 1
    return (
        f"stage {most} is visited by {visits[most]} microbatches and stage {least} by {visits[least]}; "
        "uniform_coverage allows a difference of one"
    )
