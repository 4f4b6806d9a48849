"""Problems without a plan, against every assignment of sequences there is."""

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from crowding import at_most_s
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from small_problems import make_problem

from skippipe_scheduler.errors import InfeasibleError, SkipPipeError
from skippipe_scheduler.problem.infeasibility import Conflict, find_conflict, infeasibility_message
from skippipe_scheduler.problem.problem import AutoMicrobatches, EvenMicrobatches, Problem
from skippipe_scheduler.problem.rules import (
    Rules,
    coverage_offence,
    first_offence,
    length_offence,
)
from skippipe_scheduler.problem.sequences.dealt_sequences import deal_sequences
from skippipe_scheduler.problem.sequences.listed_sequences import stage_sequences
from skippipe_scheduler.problem.sequences.sequence_flow import even_sequences
from skippipe_scheduler.slots.routes import balanced_sequences
from skippipe_scheduler.slots.slot_model import SlotModel

MIX = {17: 4, 12: 2, 9: 1}


def problem_with(rules: Rules, microbatches: int | EvenMicrobatches | AutoMicrobatches, origins: int = 1) -> Problem:
    base = make_problem(0, [origins, *[1] * (rules.num_stages - 1)], 2, 4)
    return base.model_copy(update={"rules": rules, "microbatches_per_origin": microbatches})


def large(jump: int, length: int = 17, mix: dict[int, int] | None = None, microbatches: int = 41) -> Problem:
    rules = Rules(num_stages=25, route_length=length, max_forward_jump=jump, route_lengths=mix)
    return problem_with(rules, EvenMicrobatches(even=microbatches))


def has_plan(problem: Problem) -> bool:
    """Whether some assignment of legal sequences to microbatches obeys the rules: all of them are tried."""
    rules, total = problem.rules, problem.num_microbatches
    stages = range(1, rules.num_stages)
    reached = {(0,) * len(stages)}
    choices = {frozenset(sequence) for sequence in stage_sequences(rules)}
    for length, count in rules.length_counts(total).items():
        steps = [tuple(stage in visited for stage in stages) for visited in choices if len(visited) == length]
        for _ in range(count):
            reached = {tuple(map(sum, zip(visits, step, strict=True))) for visits in reached for step in steps}
    return any(coverage_offence((total, *visits), rules) is None for visits in reached)


@st.composite
def small(draw: st.DrawFn) -> Problem:
    stages = draw(st.integers(3, 5))
    lengths = st.integers(2, stages)
    protected = draw(st.lists(st.integers(1, stages - 1), max_size=draw(st.sampled_from([0, 0, 1, 2]))))
    mix = draw(st.none() | st.dictionaries(lengths, st.integers(1, 3), min_size=1, max_size=3))
    rules = Rules(
        num_stages=stages,
        route_length=max(mix) if mix else draw(lengths),
        route_lengths=mix,
        max_swaps=draw(st.integers(0, 2)),
        max_swap_distance=draw(st.integers(0, 2)),
        max_forward_jump=draw(st.integers(1, 2)),
        uniform_coverage=draw(st.sampled_from([True, True, True, False])),
        protected_stages=tuple(protected),
    )
    origins, number = draw(st.integers(1, 2)), draw(st.integers(1, 5))
    given: list[int | EvenMicrobatches | AutoMicrobatches] = [
        EvenMicrobatches(even=number),
        AutoMicrobatches(auto=number),
        (number + 1) // 2,
    ]
    return problem_with(rules, draw(st.sampled_from(given)), origins)


@given(small())
def test_there_is_a_message_exactly_where_no_assignment_of_sequences_obeys_the_rules(problem: Problem) -> None:
    message = infeasibility_message(problem)
    assert (message is None) == has_plan(problem)
    if message is None:
        sequences = even_sequences(problem.rules, problem.num_microbatches, 0)
        assert_obeyed(sequences, problem)
    else:
        with pytest.raises(SkipPipeError, match="evenly"):
            even_sequences(problem.rules, problem.num_microbatches, 0)
        with pytest.raises(InfeasibleError):
            balanced_sequences(SlotModel(problem), 0)


@settings(suppress_health_check=[HealthCheck.filter_too_much])  # most problems have a plan
@given(small())
def test_every_rule_named_is_needed_for_the_conflict_and_its_remedy_is_the_nearest(problem: Problem) -> None:
    conflict = find_conflict(problem)
    assume(conflict is not None)
    assert conflict is not None
    lengths = "route_lengths" if problem.rules.route_lengths else "route_length"
    named = {remedy.rule for remedy in conflict.remedies if remedy.rule != "microbatches_per_origin"}
    protected = problem.rules.protected_stages
    freed: list[tuple[str, dict[str, Any]]] = [
        ("max_forward_jump", {"max_forward_jump": problem.num_stages}),
        (lengths, {"route_length": problem.num_stages, "route_lengths": None}),
        *(("protected_stages", {"protected_stages": protected[:count]}) for count in range(len(protected))),
        ("uniform_coverage", {"uniform_coverage": False}),
    ]
    assert named == {rule for rule, update in freed if has_plan(with_rules(problem, update))}
    for remedy in conflict.remedies:
        assert remedy.rule in conflict.rules or remedy.rule == "microbatches_per_origin"
        assert remedy.advice in str(conflict)
        assert changed(problem, remedy.problem) <= {remedy.rule, "route_length"}
        assert has_plan(remedy.problem)
    assert not any(has_plan(nearer) for nearer in nearer_problems(problem, conflict))


@given(
    st.integers(6, 14),
    st.integers(1, 5),
    st.dictionaries(st.integers(2, 14), st.integers(1, 9), min_size=1, max_size=4),
    st.integers(1, 40),
    st.sets(st.integers(1, 13), max_size=3),
)
def test_without_a_message_even_sequences_are_found(
    stages: int, jump: int, mix: dict[int, int], total: int, protected: set[int]
) -> None:
    rules = mixed_rules(stages, jump, mix, protected)
    problem = problem_with(rules, EvenMicrobatches(even=total))
    assume(infeasibility_message(problem) is None)
    assert_obeyed(even_sequences(rules, total, 0), problem)


def mixed_rules(stages: int, jump: int, mix: dict[int, int], protected: set[int]) -> Rules:
    """Return rules with routes of several lengths, where all that is given fits into the stages."""
    assume(max(mix) <= stages and max(protected, default=0) < stages)
    return Rules(
        num_stages=stages,
        route_length=max(mix),
        route_lengths=mix,
        max_forward_jump=jump,
        protected_stages=tuple(protected),
    )


def with_rules(problem: Problem, update: dict[str, Any]) -> Problem:
    return problem.model_copy(update={"rules": problem.rules.model_copy(update=update)})


def changed(before: Problem, after: Problem) -> set[str]:
    old, new = (problem.model_dump() | problem.rules.model_dump() for problem in (before, after))
    return {key for key in old if old[key] != new[key] and key != "rules"}


def nearer_problems(problem: Problem, conflict: Conflict) -> Iterator[Problem]:
    """Yield the problems between this one and those of its remedies."""
    found = {remedy.rule: remedy.problem for remedy in conflict.remedies}
    rules = problem.rules
    jumped = found.get("max_forward_jump", with_rules(problem, {"max_forward_jump": problem.num_stages}))
    for jump in range(rules.max_forward_jump + 1, jumped.rules.max_forward_jump):
        yield with_rules(problem, {"max_forward_jump": jump})
    if rules.route_lengths is None:
        for length in range(rules.route_length + 1, found["route_length"].rules.route_length):
            yield with_rules(problem, {"route_length": length})
    freed = found.get("protected_stages")
    for count in range(len(freed.rules.protected_stages) + 1 if freed else 0, len(rules.protected_stages)):
        yield with_rules(problem, {"protected_stages": rules.protected_stages[:count]})
    number = problem.num_microbatches
    other = found.get("microbatches_per_origin")
    distance = abs(other.num_microbatches - number) if other else number // 2 + 1
    if not isinstance(problem.microbatches_per_origin, int) and "uniform_coverage" in found:
        for nearer in range(max(1, number - distance + 1), number + distance):
            yield problem.model_copy(update={"microbatches_per_origin": EvenMicrobatches(even=nearer)})


def assert_obeyed(sequences: list[tuple[int, ...]], problem: Problem) -> None:
    rules = problem.rules
    visits = Counter(stage for sequence in sequences for stage in sequence)
    assert len(sequences) == problem.num_microbatches
    assert [offence for sequence in sequences if (offence := first_offence(sequence, rules))] == []
    assert length_offence(map(len, sequences), rules) is None
    assert coverage_offence([visits[stage] for stage in range(rules.num_stages)], rules) is None


@pytest.mark.parametrize(
    ("rules", "microbatches", "message"),
    [
        (
            Rules(num_stages=5, route_length=3, max_forward_jump=1, max_swaps=0),
            EvenMicrobatches(even=4),
            "uniform_coverage, route_length 3 of 5 stages and max_forward_jump 1 for 4 microbatches cannot be met "
            "together: no route gets past stage 2, and stage 4 is to be visited by 2 microbatches at least; "
            "raise max_forward_jump to 2, or raise route_length to 5 (skip_ratio 0), or set uniform_coverage to false",
        ),
        (
            Rules(num_stages=25, route_length=5, max_forward_jump=2),
            3,
            "uniform_coverage, route_length 5 of 25 stages and max_forward_jump 2 for 3 microbatches cannot be met "
            "together: stages 1 to 2 get 3 visits at least, and coverage allows 2; raise max_forward_jump to 3, "
            "or raise route_length to 13 (skip_ratio 0.48), or set microbatches_per_origin to 2, "
            "or set uniform_coverage to false",
        ),
        (
            Rules(num_stages=6, route_length=4, route_lengths={4: 1, 2: 3}, max_forward_jump=2),
            AutoMicrobatches(auto=8),
            "uniform_coverage, route_lengths {4: 1, 2: 3} of 6 stages and max_forward_jump 2 for 8 microbatches cannot "
            "be met together: stages 1 to 2 get 8 visits at least, and coverage allows 6; "
            "raise max_forward_jump to 3, or raise route_lengths to {6: 1, 4: 3}, or set uniform_coverage to false",
        ),
        (
            Rules(num_stages=6, route_length=3, max_forward_jump=2, uniform_coverage=False, protected_stages=(5,)),
            EvenMicrobatches(even=4),
            "protected_stages [5], route_length 3 of 6 stages and max_forward_jump 2 cannot be met together: a route "
            "through stages 0, 5 visits 4 at least; raise max_forward_jump to 3, or raise route_length to 4 "
            "(skip_ratio 0.333), or set protected_stages to []",
        ),
    ],
)
def test_message(rules: Rules, microbatches: int | EvenMicrobatches | AutoMicrobatches, message: str) -> None:
    assert infeasibility_message(problem_with(rules, microbatches)) == message


def test_a_large_problem_is_judged_at_once() -> None:
    start_s = time.perf_counter()
    assert "no route gets past stage 16" in (infeasibility_message(large(jump=1)) or "")
    assert infeasibility_message(large(jump=2)) is None
    assert time.perf_counter() - start_s < at_most_s(1.0)


@pytest.mark.parametrize("problem", [large(2), large(2, length=13), large(3, mix=MIX), large(8, 5, microbatches=9)])
def test_even_sequences_of_a_large_problem(problem: Problem) -> None:
    assert_obeyed(even_sequences(problem.rules, problem.num_microbatches, 1), problem)


@given(
    st.integers(6, 40),
    st.integers(1, 9),
    st.dictionaries(st.integers(2, 40), st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 60),
    st.sets(st.integers(1, 39), max_size=2),
)
def test_sequences_that_are_dealt_obey_the_rules(
    stages: int, jump: int, mix: dict[int, int], total: int, protected: set[int]
) -> None:
    rules = mixed_rules(stages, jump, mix, protected)
    dealt = deal_sequences(rules, total, 0)
    problem = problem_with(rules, EvenMicrobatches(even=total))
    if dealt is not None:
        assert_obeyed(dealt, problem)
        assert infeasibility_message(problem) is None
    elif not protected and len(mix) == 1 and (rules.route_length - 1) * rules.max_forward_jump != rules.num_stages - 1:
        assert infeasibility_message(problem) is not None  # but where the last stage takes nothing but longest jumps


def test_visits_that_are_rounded_the_other_way_let_the_last_stages_be_reached() -> None:
    """With five visits of each early stage, too few microbatches are left that can jump to the last one."""
    rules = Rules(num_stages=15, route_length=3, max_swaps=0, max_forward_jump=7)
    for seed in range(3):
        dealt = deal_sequences(rules, 33, seed)
        assert dealt is not None
        assert_obeyed(dealt, problem_with(rules, EvenMicrobatches(even=33)))


@pytest.mark.parametrize(
    "rules",
    [
        Rules(num_stages=128, route_length=96),
        Rules(num_stages=128, route_length=96, route_lengths={96: 1, 64: 2, 40: 1}),
        Rules(num_stages=128, route_length=64, max_forward_jump=3, protected_stages=(1, 64, 127)),
        Rules(num_stages=128, route_length=128),
        Rules(num_stages=128, route_length=40, max_forward_jump=127, uniform_coverage=False),
    ],
)
def test_even_sequences_of_128_stages_are_dealt(rules: Rules) -> None:
    problem = problem_with(rules, EvenMicrobatches(even=96))
    assert_obeyed(even_sequences(rules, 96, 0), problem)
    assert even_sequences(rules, 96, 0) == deal_sequences(rules, 96, 0)


def test_sampled_sequences_that_cannot_cover_evenly_do_not_make_a_problem_infeasible() -> None:
    problem = large(jump=3, mix=MIX)
    assert not SlotModel(problem).lists_all_sequences
    assert_obeyed(balanced_sequences(SlotModel(problem), 0), problem)
