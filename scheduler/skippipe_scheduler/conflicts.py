"""Why a problem has no plan: the rules that conflict, with numbers, and for each the nearest value that ends it.

Only `uniform_coverage` can be impossible. Memory holds at least one microbatch, so microbatches can always run one
after the other, any origin can start any sequence of stages, and ascending sequences of every length are legal. Swaps
do not help: the stages of a route, visited in ascending order, need no longer jumps.

Hop k of a route of P stages comes at stage kJ at the latest (J is `max_forward_jump`), and early enough for P - 1 - k
stages to follow. These deadlines make a least number of visits to stages 1 to m, for every m; coverage allows a most.
That no least is above its most is necessary. It also suffices: with one length because routes that take turns at
visits (S - 1) / N(P - 1) stages apart cover evenly (one stage apart where that jumps too far: N <= J then);
with a mix of lengths in all cases of up to 10 stages and 6 microbatches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from skippipe_scheduler.errors import InfeasibleError
from skippipe_scheduler.problem import AutoMicrobatches, EvenMicrobatches, Problem, Rules


@dataclass(frozen=True)
class Remedy:
    """One rule of the conflict, what to do about it, and the problem in which that is done, which has a plan."""

    rule: str
    advice: str
    problem: Problem


@dataclass(frozen=True)
class Conflict:
    """The smallest set of rules that cannot be met together, in words, and a remedy for each."""

    rules: str
    reason: str
    remedies: tuple[Remedy, ...]

    def __str__(self) -> str:
        advice = ", or ".join(remedy.advice for remedy in self.remedies)
        return f"{self.rules} cannot be met together: {self.reason}; {advice}"


def infeasibility_message(problem: Problem) -> str | None:
    """Return which rules of `problem` conflict, why, and what would help, or None where a plan exists."""
    conflict = find_conflict(problem)
    return None if conflict is None else str(conflict)


def check_feasible(problem: Problem) -> None:
    """Raise `InfeasibleError` with the message where `problem` has no plan."""
    message = infeasibility_message(problem)
    if message is not None:
        raise InfeasibleError(message)


def find_conflict(problem: Problem) -> Conflict | None:
    """Return the conflict between the rules of `problem`, or None where a plan exists."""
    crowd = _crowd(problem)
    if crowd is None:
        return None
    rules, total = problem.rules, problem.num_microbatches
    return Conflict(
        f"uniform_coverage, {_name_lengths(rules)} of {rules.num_stages} stages and max_forward_jump "
        f"{rules.max_forward_jump} for {total} microbatches",
        _reason(rules, total, crowd),
        (
            _longer_jump(problem),
            _longer_routes(problem),
            *_other_number(problem),
            _with_rules(problem, "uniform_coverage", "set uniform_coverage to false", uniform_coverage=False),
        ),
    )


@dataclass(frozen=True)
class _Crowd:
    """The stages from 1 to `last_stage` are visited `least` times or more, and may be `most` times at most."""

    last_stage: int
    least: int
    most: int


def _crowd(problem: Problem) -> _Crowd | None:
    """Return the first stages that have to be visited more often than uniform coverage allows."""
    rules = problem.rules
    if not rules.uniform_coverage:
        return None
    counts = rules.length_counts(problem.num_microbatches)
    low, high = rules.visits_per_stage(problem.num_microbatches)
    visits = sum(count * (length - 1) for length, count in counts.items())
    for last_stage in range(1, rules.num_stages):
        after = rules.num_stages - 1 - last_stage
        least = sum(
            count * max(min(length - 1, last_stage // rules.max_forward_jump), length - 1 - after)
            for length, count in counts.items()
        )
        most = min(last_stage * high, visits - after * low)
        if least > most:
            return _Crowd(last_stage, least, most)
    return None


def _reason(rules: Rules, total: int, crowd: _Crowd) -> str:
    last, (least, _) = rules.num_stages - 1, rules.visits_per_stage(total)
    longest = max(length for length, count in rules.length_counts(total).items() if count)
    furthest = rules.max_forward_jump * (longest - 1)
    if furthest < last and least > 0:
        return (
            f"no route gets past stage {furthest}, and stage {last} is to be visited by {least} microbatches at least"
        )
    stages = "stage 1" if crowd.last_stage == 1 else f"stages 1 to {crowd.last_stage}"
    return f"{stages} get {crowd.least} visits at least, and coverage allows {crowd.most}"


def _name_lengths(rules: Rules) -> str:
    return f"route_lengths {rules.route_lengths}" if rules.route_lengths else f"route_length {rules.route_length}"


def _with_rules(problem: Problem, rule: str, advice: str, **update: Any) -> Remedy:
    rules = problem.rules.model_copy(update=update)
    return Remedy(rule, advice, problem.model_copy(update={"rules": rules}))


def _first_that_works(remedies: Iterator[Remedy]) -> Remedy:
    return next(remedy for remedy in remedies if _crowd(remedy.problem) is None)


def _longer_jump(problem: Problem) -> Remedy:
    """Jumps over all stages always help."""
    jumps = range(problem.rules.max_forward_jump + 1, problem.num_stages)
    return _first_that_works(
        _with_rules(problem, "max_forward_jump", f"raise max_forward_jump to {jump}", max_forward_jump=jump)
        for jump in jumps
    )


def _longer_routes(problem: Problem) -> Remedy:
    """Routes through all stages always help."""
    return _first_that_works(_lengthened(problem, more) for more in range(1, problem.num_stages))


def _lengthened(problem: Problem, more: int) -> Remedy:
    """Every length grows by `more`, up to the number of stages."""
    rules, stages = problem.rules, problem.num_stages
    longest = min(stages, rules.route_length + more)
    if rules.route_lengths is None:
        advice = f"raise route_length to {longest} (skip_ratio {1 - longest / stages:.3g})"
        return _with_rules(problem, "route_length", advice, route_length=longest)
    shares: dict[int, int] = {}
    for length, share in rules.route_lengths.items():
        longer = min(stages, length + more)
        shares[longer] = shares.get(longer, 0) + share
    advice = f"raise route_lengths to {shares}"
    return _with_rules(problem, "route_lengths", advice, route_lengths=shares, route_length=longest)


def _other_number(problem: Problem) -> Iterator[Remedy]:
    """Yield the nearest number of microbatches with a plan, if one lies between half and twice as many."""
    given = problem.microbatches_per_origin
    now = given if isinstance(given, int) else problem.num_microbatches
    for number in sorted(range((now + 1) // 2, 2 * now + 1), key=lambda one: (abs(one - now), one)):
        remedy = _with_number(problem, number)
        if _crowd(remedy.problem) is None:
            yield remedy
            return


def _with_number(problem: Problem, number: int) -> Remedy:
    given = problem.microbatches_per_origin
    advice = f"run {number} microbatches"
    changed: int | EvenMicrobatches | AutoMicrobatches
    if isinstance(given, int):
        changed, advice = number, f"set microbatches_per_origin to {number}"
    elif isinstance(given, AutoMicrobatches):
        changed = AutoMicrobatches(auto=number)
    else:
        changed = EvenMicrobatches(even=number)
    update = {"microbatches_per_origin": changed}
    return Remedy("microbatches_per_origin", advice, problem.model_copy(update=update))
