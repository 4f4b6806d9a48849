"""Bandwidths that were not measured: rounds of pairs, and the completion by the narrowest part of a way."""

from itertools import combinations, permutations

import pytest
from hypothesis import given, settings, strategies as st

from skippipe.cluster.links.completion import Completion, completed, completion_of
from skippipe.cluster.links.host_pairs import chosen_rounds

RATES = st.floats(0.01, 10.0)


@settings(max_examples=50)
@given(regions=st.lists(st.sampled_from("abcd"), min_size=2, max_size=17), num_rounds=st.integers(1, 20))
def test_rounds_are_disjoint_and_fair(regions: list[str], num_rounds: int) -> None:
    rounds = chosen_rounds(regions, num_rounds)
    pairs = [pair for found in rounds for pair in found]
    assert len(set(pairs)) == len(pairs)
    assert set(pairs) <= set(combinations(range(len(regions)), 2))
    assert len(rounds) <= num_rounds
    for found in rounds:
        assert len({host for pair in found for host in pair}) == 2 * len(found)
    for host in range(len(regions)):
        assert any(host in pair for pair in pairs) or len(regions) % 2
    first = {host for pair in rounds[0] for host in pair}
    assert len(first) == len(regions) // 2 * 2


def test_every_pair_of_regions_is_measured() -> None:
    regions = [name for name in "abcd" for _ in range(8)]
    found = {frozenset(regions[host] for host in pair) for pairs in chosen_rounds(regions, 4) for pair in pairs}
    assert found == {frozenset(ends) for ends in (*combinations("abcd", 2), *zip("abcd", "abcd", strict=True))}


@st.composite
def networks(draw: st.DrawFn) -> tuple[list[str], dict[tuple[int, int], float], set[tuple[int, int]]]:
    """Hosts with cards, regions with links, and measured pairs that show how wide each of them is."""
    regions = ["x", "x", *draw(st.lists(st.sampled_from("xyz"), min_size=2, max_size=8))]
    hosts = range(len(regions))
    up, down = ([10.0, 10.0, *draw(st.lists(RATES, min_size=len(hosts) - 2, max_size=len(hosts) - 2))] for _ in "ud")
    across = {ends: draw(RATES) for ends in permutations("xyz", 2)} | {(name, name): 10.0 for name in "xyz"}
    truth = {
        (source, destination): min(up[source], down[destination], across[regions[source], regions[destination]])
        for source, destination in permutations(hosts, 2)
    }
    shown = set()
    for source, destination in truth:
        fastest = max(hosts, key=lambda other: truth.get((source, other), 0.0))
        shown |= {(source, fastest)}
        fastest = max(hosts, key=lambda other: truth.get((other, destination), 0.0))
        shown |= {(fastest, destination)}
        ends = regions[source], regions[destination]
        shown.add(max((pair for pair in truth if (regions[pair[0]], regions[pair[1]]) == ends), key=truth.__getitem__))
    return regions, truth, shown


@settings(max_examples=60)
@given(network=networks())
def test_a_matrix_that_obeys_the_model_is_given_back(
    network: tuple[list[str], dict[tuple[int, int], float], set[tuple[int, int]]],
) -> None:
    regions, truth, shown = network
    assert completed(regions, {pair: truth[pair] for pair in shown}) == truth
    hidden = {pair: rate for pair, rate in truth.items() if pair not in shown}
    completion = completion_of(regions, {pair: truth[pair] for pair in shown}, hidden)
    assert not any(completion.relative_errors)
    assert completion.measured_pairs == completion.all_pairs


def test_the_narrowest_part_of_a_way_decides() -> None:
    measured = {(0, 1): 8.0, (1, 0): 6.0, (2, 0): 1.0, (0, 2): 2.0}
    found = completed(["a", "a", "b"], measured)
    assert found == measured | {(1, 2): 2.0, (2, 1): 1.0}
    assert completion_of(["a", "a", "b"], measured, {(1, 2): 1.6}).relative_errors == pytest.approx((0.25,))
    assert completed(["a"] * 4, {(0, 1): 3.0, (1, 0): 3.0})[2, 3] == 3.0
    with pytest.raises(ValueError, match="nothing to complete from"):
        completed(["a", "b"], {})


def test_errors_are_summed_up() -> None:
    completion = Completion(5, 10, (0.1, -0.2, 0.0, 0.05, -0.5))
    assert completion.median_error == pytest.approx(0.1)
    assert completion.most_error == pytest.approx(0.5)
