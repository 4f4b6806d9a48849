"""Legal stage sequences: the enumeration against the judge, and against published routes."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from skippipe_scheduler.problem import Rules
from skippipe_scheduler.rules import (
    coverage_offence,
    first_offence,
    legal_stage_sequences,
    length_offence,
    sample_sequences,
)


@given(
    num_stages=st.integers(2, 6),
    data=st.data(),
    swaps=st.integers(0, 3),
    distance=st.integers(0, 3),
    jump=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
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
    )
    accepted = [
        sequence
        for sequence in itertools.permutations(range(num_stages), length)
        if first_offence(sequence, rules) is None
    ]
    assert list(legal_stage_sequences(rules)) == accepted


def test_full_pipeline_without_swaps_has_one_route() -> None:
    assert legal_stage_sequences(Rules(num_stages=5, route_length=5, max_swaps=0)) == ((0, 1, 2, 3, 4),)


def test_numbers_of_routes_by_hand() -> None:
    no_swaps = Rules(num_stages=6, route_length=4, max_swaps=0, max_forward_jump=5)
    assert len(legal_stage_sequences(no_swaps)) == 10  # choose 3 of 5
    one_swap = no_swaps.model_copy(update={"max_swaps": 1, "max_swap_distance": 1})
    assert len(legal_stage_sequences(one_swap)) == 30  # each as it is, or with one of two neighbouring pairs swapped


@pytest.mark.parametrize(
    ("sequence", "offence"),
    [
        ((0, 1, 2), "visits 3 stages"),
        ((0, 1, 2, 9), "visits stage 9"),
        ((0, 1, 1, 2), "visits stage 1 twice"),
        ((1, 0, 2, 3), "starts at stage 1"),
        ((0, 5, 4, 3), "after 2 higher ones"),
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


def test_mix_of_lengths_is_counted_and_described() -> None:
    rules = Rules(num_stages=6, route_length=6, route_lengths={6: 1, 4: 1, 3: 2})
    assert rules.lengths == (3, 4, 6)
    assert rules.describe_lengths() == "6, 4 or 3"
    assert rules.length_counts(8) == {3: 4, 4: 2, 6: 2}
    assert sum(rules.length_counts(7).values()) == 7
    assert {len(sequence) for sequence in legal_stage_sequences(rules)} == {3, 4, 6}
    assert first_offence((0, 1, 2, 3, 4), rules) == "visits 5 stages, route_lengths are [3, 4, 6]"
    assert length_offence([6, 4, 3, 3], rules) is None
    assert "asks for 2" in str(length_offence([6, 4, 4, 3], rules))


def test_longest_of_a_mix_is_the_route_length() -> None:
    with pytest.raises(ValidationError, match="the longest of route_lengths is 4"):
        Rules(num_stages=6, route_length=6, route_lengths={4: 1, 3: 2})


def test_sampled_sequences_are_legal_and_visit_all_stages_alike() -> None:
    rules = Rules(num_stages=25, route_length=17, max_forward_jump=3)
    sequences = sample_sequences(rules, 100)
    assert len(sequences) > 50
    assert all(first_offence(sequence, rules) is None for sequence in sequences)
    visits = [sum(stage in sequence for sequence in sequences) for stage in range(1, 25)]
    assert max(visits) - min(visits) <= 0.2 * max(visits)
