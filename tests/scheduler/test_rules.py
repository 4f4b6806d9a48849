"""Legal stage sequences: the enumeration against the judge, and against published routes."""

import itertools

import pytest
from hypothesis import given, settings, strategies as st
from pydantic import ValidationError

from skippipe_scheduler.problem.rules import (
    Rules,
    coverage_offence,
    first_offence,
    length_offence,
)
from skippipe_scheduler.problem.sequences.listed_sequences import stage_sequences
from skippipe_scheduler.problem.sequences.sampled_sequences import sample_sequences


@given(
    num_stages=st.integers(2, 6),
    data=st.data(),
    swaps=st.integers(0, 3),
    distance=st.integers(0, 3),
    jump=st.integers(1, 5),
)
@settings(max_examples=60)
def test_enumeration_is_what_the_judge_accepts(
    num_stages: int, data: st.DataObject, swaps: int, distance: int, jump: int
) -> None:
    length = data.draw(st.integers(2, num_stages))
    rules = Rules(
        num_stages=num_stages,
        route_length=length,
        max_swaps=swaps,
        max_swap_distance=distance,
        max_forward_jump=jump,
        protected_stages=tuple(data.draw(st.lists(st.integers(0, num_stages - 1), max_size=2))),
    )
    accepted = [
        sequence
        for sequence in itertools.permutations(range(num_stages), length)
        if first_offence(sequence, rules) is None
    ]
    assert list(stage_sequences(rules)) == accepted


def test_full_pipeline_without_swaps_has_one_route() -> None:
    assert tuple(stage_sequences(Rules(num_stages=5, route_length=5, max_swaps=0))) == ((0, 1, 2, 3, 4),)


def test_numbers_of_routes_by_hand() -> None:
    no_swaps = Rules(num_stages=6, route_length=4, max_swaps=0, max_forward_jump=5)
    assert len(tuple(stage_sequences(no_swaps))) == 10  # choose 3 of 5
    one_swap = no_swaps.model_copy(update={"max_swaps": 1, "max_swap_distance": 1})
    # Each as it is, or with a pair of neighbouring stages exchanged: 4 such pairs, each with 3 thirds to go with.
    assert len(tuple(stage_sequences(one_swap))) == 10 + 4 * 3


@pytest.mark.parametrize(
    ("sequence", "offence"),
    [
        ((0, 1, 2), "visits 3 stages"),
        ((0, 1, 2, 9), "visits stage 9"),
        ((0, 1, 1, 2), "visits stage 1 twice"),
        ((1, 0, 2, 3), "starts at stage 1"),
        ((0, 5, 4, 3), "visits stage 3 after stage 5, a swap of distance 2; max_swap_distance is 1"),
        ((0, 2, 1, 5), "jumps from stage 2 to 5"),
        ((0, 2, 1, 3), None),
    ],
)
def test_offences_are_named(sequence: tuple[int, ...], offence: str | None) -> None:
    rules = Rules(num_stages=6, route_length=4, max_swaps=1, max_forward_jump=2)
    if sequence == (0, 5, 4, 3):
        rules = rules.model_copy(update={"max_forward_jump": 5, "max_swaps": 2})
    found = first_offence(sequence, rules)
    assert (found is None) if offence is None else (found is not None and offence in found)


def test_distance_of_a_swap_counts_the_stages_left_out() -> None:
    rules = Rules(num_stages=6, route_length=4, max_swaps=1, max_swap_distance=2)
    assert first_offence((0, 1, 5, 2), rules) == (
        "visits stage 2 after stage 5, a swap of distance 3; max_swap_distance is 2 (releases up to 0.2 counted the "
        "higher stages visited before, here 1, not the stage numbers between; plan again)"
    )
    assert first_offence((0, 1, 5, 2), rules.model_copy(update={"max_swap_distance": 3})) is None
    assert first_offence((0, 1, 5, 4), rules.model_copy(update={"max_swap_distance": 1})) is None


def test_too_many_swaps_are_named() -> None:
    rules = Rules(num_stages=6, route_length=5, max_swaps=1, max_forward_jump=5)
    assert first_offence((0, 2, 1, 4, 3), rules) == "has 2 swaps, max_swaps is 1"


@pytest.mark.parametrize(
    ("visits", "uniform", "fair"),
    [((9, 6, 6, 6), True, True), ((9, 6, 7, 6), True, True), ((9, 5, 7, 6), True, False), ((9, 0, 9, 9), False, True)],
)
def test_coverage(visits: tuple[int, ...], uniform: bool, fair: bool) -> None:
    rules = Rules(num_stages=4, route_length=3, uniform_coverage=uniform)
    assert (coverage_offence(visits, rules) is None) == fair


PUBLISHED = ((0, 1, 2, 3), (0, 1, 5, 4), (0, 4, 3, 5), (0, 2, 5, 4), (0, 3, 2, 5), (0, 2, 1, 3), (0, 3, 4, 5))
"""Stage sequences of the schedule published with the SkipPipe reference code (20 nodes, 33% skip)."""


@pytest.mark.parametrize("sequence", PUBLISHED)
def test_published_routes_are_legal(sequence: tuple[int, ...]) -> None:
    rules = Rules(num_stages=6, route_length=4, max_swaps=2, max_swap_distance=1, max_forward_jump=4)
    assert first_offence(sequence, rules) is None


def test_protected_stages_are_on_every_route_and_the_others_share_what_is_left() -> None:
    rules = Rules(num_stages=6, route_length=4, max_swaps=0, max_forward_jump=5, protected_stages=(5, 0, 5))
    assert rules.protected_stages == (5,)
    assert rules.shared_stages == (1, 2, 3, 4)
    assert len(tuple(stage_sequences(rules))) == 6  # choose 2 of 4
    assert first_offence((0, 1, 2, 3), rules) == "leaves out stage 5, protected_stages are [5]"
    assert rules.coverage(8) == ((8, 8), (4, 4), (4, 4), (4, 4), (4, 4), (8, 8))
    assert coverage_offence((8, 4, 4, 4, 4, 8), rules) is None
    assert coverage_offence((8, 6, 4, 3, 3, 8), rules) == (
        "stage 1 is visited by 6 microbatches and stage 3 by 3; uniform_coverage allows a difference of one"
    )
    anyhow = rules.model_copy(update={"uniform_coverage": False})
    assert anyhow.coverage(8) == ((8, 8), *[(0, 8)] * 4, (8, 8))


def test_all_stages_can_be_protected() -> None:
    rules = Rules(num_stages=3, route_length=3, protected_stages=(1, 2))
    assert rules.coverage(4) == ((4, 4),) * 3
    assert coverage_offence((4, 4, 4), rules) is None


def test_a_stage_that_there_is_not_cannot_be_protected() -> None:
    with pytest.raises(ValidationError, match="protected_stages has stage 6, stages are 0 to 5"):
        Rules(num_stages=6, route_length=4, protected_stages=(6,))


def test_mix_of_lengths_is_counted_and_described() -> None:
    rules = Rules(num_stages=6, route_length=6, route_lengths={6: 1, 4: 1, 3: 2})
    assert rules.lengths == (3, 4, 6)
    assert rules.describe_lengths() == "6, 4 or 3"
    assert rules.length_counts(8) == {3: 4, 4: 2, 6: 2}
    assert sum(rules.length_counts(7).values()) == 7
    assert {len(sequence) for sequence in stage_sequences(rules)} == {3, 4, 6}
    assert first_offence((0, 1, 2, 3, 4), rules) == "visits 5 stages, route_lengths are [3, 4, 6]"
    assert length_offence([6, 4, 3, 3], rules) is None
    assert "asks for 2" in str(length_offence([6, 4, 4, 3], rules))


def test_longest_of_a_mix_is_the_route_length() -> None:
    with pytest.raises(ValidationError, match="the longest of route_lengths is 4"):
        Rules(num_stages=6, route_length=6, route_lengths={4: 1, 3: 2})


@pytest.mark.parametrize(
    ("rules", "number"),
    [
        (Rules(num_stages=21, route_length=14, max_swaps=0), 2001),
        (Rules(num_stages=128, route_length=96, max_swaps=2, max_swap_distance=3), 2001),
        (Rules(num_stages=128, route_length=128, max_swaps=0), 1),
        (Rules(num_stages=128, route_length=127, max_swaps=0, max_forward_jump=1), 1),
        (Rules(num_stages=128, route_length=33, max_swaps=0, protected_stages=(127,)), 32),  # 32 jumps over 127
        (Rules(num_stages=128, route_length=5, max_swaps=0, protected_stages=(127,)), 0),
    ],
)
def test_enumeration_walks_into_no_dead_end(rules: Rules, number: int) -> None:
    """It would never end if it did."""
    found = tuple(itertools.islice(stage_sequences(rules), 2001))
    assert len(set(found)) == number
    assert all(first_offence(sequence, rules) is None for sequence in found)
    assert list(found) == sorted(found)


@pytest.mark.parametrize("protected", [(), (24,), (7, 8, 24)])
def test_sampled_sequences_are_legal_and_visit_all_stages_alike(protected: tuple[int, ...]) -> None:
    rules = Rules(num_stages=25, route_length=17, max_forward_jump=3, protected_stages=protected)
    sequences = sample_sequences(rules, 100)
    assert len(sequences) > 50
    assert all(first_offence(sequence, rules) is None for sequence in sequences)
    visits = [sum(stage in sequence for sequence in sequences) for stage in rules.shared_stages]
    assert max(visits) - min(visits) <= 0.2 * max(visits)
