"""The rules of routes, and whether a sequence of stages obeys them.

They are SkipPipe's convergence constraints (arXiv 2502.19913), made exact in docs/plan-file.md. The *frontier* is the
highest stage number visited so far. A visit below it is a swap; its distance is the frontier minus the stage.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Self, TypedDict, Unpack

from pydantic import Field, ValidationError, field_validator, model_validator

from skippipe_scheduler.errors import ProblemError
from skippipe_scheduler.files import Count, PositiveCount, StrictModel, describe_made
from skippipe_scheduler.problem.workload import route_length

RouteLength = Annotated[int, Field(ge=2)]


class Rules(StrictModel):
    """What routes may do: the constraints of the SkipPipe paper, made exact in docs/plan-file.md.

    Examples:
        >>> rules = Rules(num_stages=6, route_length=4)
        >>> rules.coverage(10)  # the least and the most of 10 microbatches that may visit each stage
        ((10, 10), (6, 6), (6, 6), (6, 6), (6, 6), (6, 6))
        >>> Rules(num_stages=6, route_length=6, route_lengths={6: 1, 3: 3}).length_counts(8)
        {3: 6, 6: 2}
    """

    num_stages: Annotated[int, Field(ge=2, examples=[6])]
    """Stages of the model."""
    route_length: Annotated[int, Field(ge=2, examples=[4])]
    """How many stages a route visits; of a mix the longest."""
    max_swaps: Count = 1
    """How many swaps a route may make: visits of a stage after a higher one."""
    max_swap_distance: Count = 1
    """How far a swap may lie behind the highest stage visited before it, in stage numbers; 0 turns swaps off."""
    max_forward_jump: PositiveCount = 4
    """How many stages past the furthest one visited a route may jump."""
    uniform_coverage: bool = True
    """Whether the stages that routes may leave out are all visited equally often, to within one visit."""
    route_lengths: Annotated[dict[RouteLength, PositiveCount], Field(min_length=1)] | None = Field(
        default=None, examples=[{6: 1, 4: 1, 3: 2}]
    )
    """A mix of lengths: shares of the microbatches by route length. `route_length` is then the longest of them."""
    protected_stages: tuple[Count, ...] = Field(default=(), examples=[[5]])
    """Stages beside 0 that every route visits, ascending."""
    absent_stages: Annotated[tuple[Count, ...], Field(min_length=1)] | None = Field(default=None, examples=[[2]])
    """Of a plan: stages that nobody holds and no route visits, ascending. Jumps do not count them, swaps do."""

    @field_validator("protected_stages")
    @classmethod
    def _sorted_beside_the_first(cls, stages: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(stages) - {0}))

    @model_validator(mode="after")
    def _route_fits(self) -> Self:
        if self.route_length > self.num_stages:
            raise ValueError(f"route_length {self.route_length} is more than the {self.num_stages} stages there are")
        if self.route_lengths and max(self.route_lengths) != self.route_length:
            raise ValueError(
                f"route_length is {self.route_length}, but the longest of route_lengths is {max(self.route_lengths)}"
            )
        if self.protected_stages and self.protected_stages[-1] >= self.num_stages:
            raise ValueError(
                f"protected_stages has stage {self.protected_stages[-1]}, stages are 0 to {self.num_stages - 1}"
            )
        return self

    @model_validator(mode="after")
    def _absent_stages_fit(self) -> Self:
        absent = self.absent_stages or ()
        if list(absent) != sorted(set(absent)) or not set(absent) <= set(range(1, self.num_stages)):
            raise ValueError(f"absent_stages are {list(absent)}; they ascend and lie within 1 to {self.num_stages - 1}")
        if self.route_length > self.num_stages - len(absent):
            left = self.num_stages - len(absent)
            raise ValueError(f"route_length {self.route_length} is more than the {left} stages that are not absent")
        both = sorted(set(absent).intersection(self.protected_stages))
        if both:
            raise ValueError(f"stage {both[0]} is in absent_stages and in protected_stages; leave it out of one")
        return self

    @property
    def lengths(self) -> tuple[int, ...]:
        """Every length that a route may have, shortest first."""
        return tuple(sorted(self.route_lengths)) if self.route_lengths else (self.route_length,)

    @property
    def shared_stages(self) -> tuple[int, ...]:
        """Stages that a route may leave out."""
        others = (*self.protected_stages, *(self.absent_stages or ()))
        return tuple(stage for stage in range(1, self.num_stages) if stage not in others)

    def describe_lengths(self) -> str:
        """Return the lengths that routes may have, in words: "4", or "6, 4 or 3"."""
        *others, last = [str(length) for length in reversed(self.lengths)]
        return f"{', '.join(others)} or {last}" if others else last

    def length_counts(self, total: int) -> dict[int, int]:
        """Return how many of `total` microbatches have each length: by share, rests to the largest remainders."""
        shares = self.route_lengths or {self.route_length: 1}
        whole = sum(shares.values())
        counts = {length: total * share // whole for length, share in shares.items()}
        largest = sorted(shares, key=lambda length: (-(total * shares[length] % whole), -length))
        for length in largest[: total - sum(counts.values())]:
            counts[length] += 1
        return dict(sorted(counts.items()))

    def coverage(self, total: int) -> tuple[tuple[int, int], ...]:
        """Return by stage the least and the greatest number of `total` microbatches that may visit it.

        All visit stage 0 and those protected; the others share the rest of the visits, to within one where coverage is
        uniform.
        """
        always = 1 + len(self.protected_stages)
        visits = sum(count * (length - always) for length, count in self.length_counts(total).items())
        share, rest = divmod(visits, len(self.shared_stages) or 1)
        bounds = (share, share + (rest > 0)) if self.uniform_coverage else (0, total)
        fixed = dict.fromkeys(self.absent_stages or (), (0, 0))
        return tuple(
            bounds if stage in self.shared_stages else fixed.get(stage, (total, total))
            for stage in range(self.num_stages)
        )

    def limits(self, total: int) -> dict[int, tuple[int, int]]:
        """Return `coverage` of the stages behind 0 that not just any number of `total` microbatches may visit."""
        bounds = enumerate(self.coverage(total))
        return {stage: bound for stage, bound in bounds if stage and bound != (0, total)}


class RouteLimits(TypedDict, total=False):
    """What `Rules` says beside stages and lengths; each is as in `Rules` where it is not given."""

    max_swaps: int
    max_swap_distance: int
    max_forward_jump: int
    uniform_coverage: bool
    protected_stages: tuple[int, ...]
    absent_stages: tuple[int, ...] | None


def skip_rules(
    num_stages: int,
    skip_ratio: float = 0.0,
    *,
    route_lengths: Mapping[int, int] | None = None,
    **limits: Unpack[RouteLimits],
) -> Rules:
    """Return the rules of routes that leave out a share of the stages.

    Args:
        num_stages: Into how many stages the model's layers are cut.
        skip_ratio: Share of the stages that a route leaves out, rounded to a whole number of stages.
        route_lengths: A mix of lengths in place of the ratio: shares of the microbatches by the number of stages that
            they visit.
        limits: Further fields of `Rules`.

    Returns:
        The rules.

    Raises:
        ProblemError: They do not fit together.

    Examples:
        >>> skip_rules(6, 0.33, max_swaps=0).route_length
        4
        >>> skip_rules(3, 0.7)
        Traceback (most recent call last):
        skippipe_scheduler.errors.ProblemError: skip_ratio 0.7 leaves 1 of 3 stages, a route needs at least 2; ...
    """
    try:
        return Rules(
            num_stages=num_stages,
            route_length=max(route_lengths) if route_lengths else route_length(num_stages, skip_ratio),
            route_lengths=None if route_lengths is None else dict(route_lengths),
            **limits,
        )
    except ValidationError as reason:
        raise ProblemError(describe_made(reason)) from None


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
    absent = [stage for stage in sequence if stage in (rules.absent_stages or ())]
    if absent:
        return f"visits stage {absent[0]}, absent_stages are {list(rules.absent_stages or ())}"
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
        jump = stage - frontier - sum(frontier < absent < stage for absent in rules.absent_stages or ())
        if jump > rules.max_forward_jump:
            return (
                f"jumps from stage {frontier} to {stage}, {jump} past the furthest visited; "
                f"max_forward_jump is {rules.max_forward_jump}"
            )
        if frontier - stage > rules.max_swap_distance:
            return f"visits stage {stage} after stage {frontier}, {_swap_too_far(stage, before, rules)}"
        swaps += stage < frontier
    if swaps > rules.max_swaps:
        return f"has {swaps} swaps, max_swaps is {rules.max_swaps}"
    return None


def _swap_too_far(stage: int, before: Sequence[int], rules: Rules) -> str:
    """Return the words for a swap that is too far, with a reason where plans of earlier releases hold it."""
    words = f"a swap of distance {max(before) - stage}; max_swap_distance is {rules.max_swap_distance}"
    higher = sum(visited > stage for visited in before)
    if higher > rules.max_swap_distance:
        return words
    return (
        f"{words} (releases up to 0.2 counted the higher stages visited before, here {higher}, not the stage numbers "
        "between; plan again)"
    )


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
