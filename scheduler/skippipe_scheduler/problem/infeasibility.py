"""Why a problem has no plan: the rules that conflict, with numbers, and for each the nearest value that ends it.

Only `protected_stages` and `uniform_coverage` can be impossible. Memory holds at least one microbatch, so microbatches
can always run one after the other, any origin can start any sequence of stages, and ascending sequences of every length
are legal. Swaps do not help: the stages of a route, visited in ascending order, need no longer jumps.

A route through all protected stages has a least length: between two of them, g stages apart, it makes ceil(g / J) hops
(J is `max_forward_jump`). With enough length, hop k comes kJ stages behind the last protected stage before it at the
latest, and early enough for the hops that are left to follow. These deadlines make a least number of visits to stages 1
to m, for every m; coverage allows a most. That no least is above its most is necessary. It also suffices: with one
length and none protected because routes that take turns at visits (S - 1) / N(P - 1) stages apart cover evenly (one
stage apart where that jumps too far: N <= J then); with a mix of lengths in all cases of up to 10 stages and 6
microbatches. With protected stages it suffices nearly always; a search for such routes decides there.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from math import ceil
from typing import Any

from skippipe_scheduler.errors import InfeasibleError
from skippipe_scheduler.problem.problem import AutoMicrobatches, EvenMicrobatches, Problem
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.problem.sequences.sequence_flow import may_cover


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
    rules, total = problem.rules, problem.num_microbatches
    least = _least_length(rules)
    if least > _shortest(problem):
        remedies = (*_longer_jump(problem), _longer_routes(problem), *_unprotected(problem))
        reason = f"a route through stages {', '.join(map(str, (0, *rules.protected_stages)))} visits {least} at least"
        return Conflict(_name_rules(rules, remedies, "protected_stages"), reason, remedies)
    violation = _coverage_violation(problem)
    if violation is None and _protection_leaves_coverage(problem):
        return None
    remedies = (
        *_longer_jump(problem),
        _longer_routes(problem),
        *_other_number(problem),
        *_unprotected(problem),
        _with_rules(problem, "uniform_coverage", "set uniform_coverage to false", uniform_coverage=False),
    )
    return Conflict(
        f"{_name_rules(rules, remedies)} for {total} microbatches", _reason(rules, total, violation), remedies
    )


def _has_plan(problem: Problem) -> bool:
    reached = _least_length(problem.rules) <= _shortest(problem)
    return reached and _coverage_violation(problem) is None and _protection_leaves_coverage(problem)


def _protection_leaves_coverage(problem: Problem) -> bool:
    """Return whether routes through the protected stages can cover the others, where deadlines do not tell."""
    rules = problem.rules
    return not (rules.protected_stages and rules.uniform_coverage) or may_cover(rules, problem.num_microbatches)


def _least_length(rules: Rules) -> int:
    """Return the fewest stages of a route through all protected ones."""
    return 1 + _hops_to(rules, rules.protected_stages[-1] if rules.protected_stages else 0)


def _hops_to(rules: Rules, protected: int) -> int:
    """Return the fewest hops to a protected stage (or 0) through all those before it."""
    passed = [0, *(stage for stage in rules.protected_stages if stage <= protected)]
    return sum(ceil((later - earlier) / rules.max_forward_jump) for earlier, later in pairwise(passed))


def _shortest(problem: Problem) -> int:
    """Return the stages of the shortest route that some microbatch has."""
    counts = problem.rules.length_counts(problem.num_microbatches)
    return min(length for length, count in counts.items() if count)


@dataclass(frozen=True)
class _CoverageViolation:
    """The stages from 1 to `last_stage` are visited `least` times or more, and may be `most` times at most."""

    last_stage: int
    least: int
    most: int


def _coverage_violation(problem: Problem) -> _CoverageViolation | None:
    """Return the first stages that have to be visited more often than uniform coverage allows."""
    rules = problem.rules
    if not rules.uniform_coverage:
        return None
    counts = rules.length_counts(problem.num_microbatches)
    bounds = rules.coverage(problem.num_microbatches)
    visits = sum(count * (length - 1) for length, count in counts.items())
    for last_stage in range(1, rules.num_stages):
        least = sum(count * _fewest_visits(rules, length, last_stage) for length, count in counts.items())
        most_before = sum(high for _, high in bounds[1 : last_stage + 1])
        most = min(most_before, visits - sum(low for low, _ in bounds[last_stage + 1 :]))
        if least > most:
            return _CoverageViolation(last_stage, least, most)
    return None


def _fewest_visits(rules: Rules, length: int, last_stage: int) -> int:
    """Return the fewest visits to stages 1 to `last_stage` on a route of that length."""
    protected = max((stage for stage in rules.protected_stages if stage <= last_stage), default=0)
    hops, after = _hops_to(rules, protected), rules.num_stages - 1 - last_stage
    further = min(length - 1 - hops, (last_stage - protected) // rules.max_forward_jump)
    return max(hops + further, length - 1 - after)


def _reason(rules: Rules, total: int, violation: _CoverageViolation | None) -> str:
    if violation is None:
        return "routes through the protected stages cannot visit the others equally often"
    last, (least, _) = rules.num_stages - 1, rules.coverage(total)[-1]
    longest = max(length for length, count in rules.length_counts(total).items() if count)
    furthest = rules.max_forward_jump * (longest - 1)
    if furthest < last and least > 0:
        return (
            f"no route gets past stage {furthest}, and stage {last} is to be visited by {least} microbatches at least"
        )
    stages = "stage 1" if violation.last_stage == 1 else f"stages 1 to {violation.last_stage}"
    return f"{stages} get {violation.least} visits at least, and coverage allows {violation.most}"


def _name_rules(rules: Rules, remedies: tuple[Remedy, ...], *always: str) -> str:
    """Name the rules of a conflict: those whose change ends it, and some `always`."""
    lengths = f"route_lengths {rules.route_lengths}" if rules.route_lengths else f"route_length {rules.route_length}"
    words = {
        "uniform_coverage": "uniform_coverage",
        "protected_stages": f"protected_stages {list(rules.protected_stages)}",
        "route_lengths": f"{lengths} of {rules.num_stages} stages",
        "route_length": f"{lengths} of {rules.num_stages} stages",
        "max_forward_jump": f"max_forward_jump {rules.max_forward_jump}",
    }
    changed = {*always, *(remedy.rule for remedy in remedies)}
    *others, last = [text for rule, text in words.items() if rule in changed]
    return f"{', '.join(others)} and {last}"


def _with_rules(problem: Problem, rule: str, advice: str, **update: Any) -> Remedy:
    rules = problem.rules.model_copy(update=update)
    return Remedy(rule, advice, problem.model_copy(update={"rules": rules}))


def _first_that_works(remedies: Iterable[Remedy]) -> list[Remedy]:
    return list(islice((remedy for remedy in remedies if _has_plan(remedy.problem)), 1))


def _longer_jump(problem: Problem) -> list[Remedy]:
    """Jumps over all stages help, unless more stages are protected than a route visits."""
    jumps = range(problem.rules.max_forward_jump + 1, problem.num_stages)
    return _first_that_works(
        _with_rules(problem, "max_forward_jump", f"raise max_forward_jump to {jump}", max_forward_jump=jump)
        for jump in jumps
    )


def _unprotected(problem: Problem) -> list[Remedy]:
    """Protecting fewer stages, the last ones first, may help; no stage that is protected is in the way of another."""
    protected = problem.rules.protected_stages
    return _first_that_works(
        _with_rules(problem, "protected_stages", f"set protected_stages to {list(fewer)}", protected_stages=fewer)
        for fewer in (protected[:count] for count in reversed(range(len(protected))))
    )


def _longer_routes(problem: Problem) -> Remedy:
    """Routes through all stages always help."""
    return _first_that_works(_lengthened(problem, more) for more in range(1, problem.num_stages))[0]


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
    for number in sorted(range((now + 1) // 2, 2 * now + 1), key=lambda number: (abs(number - now), number)):
        remedy = _with_number(problem, number)
        if _has_plan(remedy.problem):
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
