"""Which layers a policy runs."""

import copy
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, strategies as st
from tiny_decoders import decoder_of, tiny

from skippipe.cli.shared_options import POLICIES
from skippipe.errors import InputError
from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import Segment, segments
from skippipe.inference.policies.base import Policy, PolicyContext, kept_stages
from skippipe.inference.policies.construction import build_policy
from skippipe.inference.policies.registry import OWN
from skippipe.inference.policies.skipdecode import SkipDecode
from skippipe.inference.policies.unified import unified_layers


@pytest.fixture(scope="module")
def six() -> Decoder:
    """A model of 6 layers in 4 stages of unequal size; stages 1 and 2 share no node, stage 3 has two."""
    decoder = decoder_of(tiny("llama", num_hidden_layers=6), [(0, 1), (1, 3), (3, 5), (5, 6)])
    decoder.stage_nodes = (("a", "b"), ("c",), ("d",), ("e", "f"))
    return decoder


def policy(decoder: Decoder, specification: str, keep: float = 1.0, **options: Any) -> Policy:
    return build_policy(specification, PolicyContext(decoder, keep, **options))


@cache
def twelve() -> Decoder:
    return decoder_of(tiny("llama", num_hidden_layers=12))


@given(num_stages=st.integers(1, 12), data=st.data(), index=st.integers(0, 100), seed=st.integers(0, 5))
def test_random_stages_are_a_sorted_subset_with_stage_zero(
    num_stages: int, data: st.DataObject, index: int, seed: int
) -> None:
    decoder = copy.copy(twelve())
    decoder.stages = decoder.stages[:num_stages]
    kept = data.draw(st.integers(1, num_stages))
    layers = policy(decoder, "random", kept / num_stages, seed=seed).sample(index).layers_at(0, 0)
    chosen = [layer for layer in layers if isinstance(layer, int)]
    assert len(chosen) == len(layers) == len(set(layers)) == kept
    assert layers[0] == 0
    assert chosen == sorted(chosen)
    assert max(chosen) < num_stages
    assert layers == policy(decoder, "random", kept / num_stages, seed=seed).sample(index).layers_at(7, 3)


def test_random_choices_are_uniform_over_the_other_stages(six: Decoder) -> None:
    drawn = policy(six, "random", 0.5)
    counts = Counter(drawn.sample(index).layers_at(0, 0) for index in range(3000))
    assert set(counts) == {(0, 1, 2), (0, 3, 4), (0, 5)}
    assert all(abs(count - 1000) < 110 for count in counts.values())


@pytest.mark.parametrize(("keep", "stages"), [(1.0, 6), (0.67, 4), (0.5, 3), (0.2, 1)])
def test_share_of_depth_in_stages(keep: float, stages: int) -> None:
    assert kept_stages(keep, 6) == stages


@pytest.mark.parametrize("keep", [0.0, -1.0, 1.5, float("nan"), 0.05])
@pytest.mark.parametrize("name", ["random", "unified", "skipdecode", "exit"])
def test_impossible_shares_are_refused(six: Decoder, name: str, keep: float) -> None:
    with pytest.raises(InputError, match="--keep"):
        policy(six, name, keep)


def test_given_stages_run_in_their_order(six: Decoder) -> None:
    assert policy(six, "stages:0,2,1").layers_at(5, 2) == (0, 3, 4, 1, 2)
    assert policy(six, "without:c,e").layers_at(5, 2) == (0, 3, 4, 5), "f still holds the stage of e"
    assert policy(six, "without:e,d,f").num_stages == 2


@pytest.mark.parametrize(
    ("specification", "expected"),
    [
        ("stages:1,2", "stage 0"),
        ("stages:0,7", "no stage 7"),
        ("stages:0,1,1", "twice"),
        ("stages:0,b", "numbers of stages"),
        ("stages", "say what runs"),
        ("without:a,b", "stage 0"),
        ("without:g", "no node 'g'"),
        ("unifed", "did you mean 'unified'"),
        ("exit:3", "takes nothing"),
        ("skipdecode:warmup=1", "unknown option 'warmup=1'"),
        ("skipdecode:warm_up=few", "'warm_up=few': expected a whole number after warm_up="),
        ("skipdecode:warm_up=nan", "'warm_up=nan': expected a whole number after warm_up="),
        ("skipdecode:max=inf", "'max=inf': expected a whole number after max="),
        ("skipdecode:min=2.7,max=5", "'min=2.7': expected a whole number after min="),
        ("ffn-skip:span=nan", "'span=nan': expected a whole number after span="),
        ("ffn-skip:first=1.5", "'first=1.5': expected a whole number after first="),
        ("ffn-skip:threshold=nan", "'threshold=nan': expected a finite number after threshold="),
        ("ffn-skip:threshold=high", "'threshold=high': expected a finite number after threshold="),
        ("skipdecode:min=5,max=4", "from 4 to 5 of 6 layers"),
    ],
)
def test_mistakes_are_named(six: Decoder, specification: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        policy(six, specification)


def test_options_take_the_numbers_that_their_defaults_are(six: Decoder) -> None:
    context = PolicyContext(six, 0.5, argument="whole=2.0,part=2.5")
    assert context.options({"whole": 1, "part": 0.0, "other": 3}) == {"whole": 2.0, "part": 2.5, "other": 3}
    assert context.options({"whole": 1.0, "part": 0.0}) == {"whole": 2.0, "part": 2.5}
    with pytest.raises(InputError, match=r"'part=2\.5': expected a whole number after part="):
        context.options({"whole": 1, "part": 0})


def slow_unified(num_layers: int, speed_up: float) -> list[int]:
    """Return the layers as the paper words it: ends first, then multiples of the interval until there are enough."""
    kept = int(num_layers / speed_up)
    chosen = {0, num_layers - 1}
    interval = int(num_layers / (kept - 1))
    for layer in range(1, num_layers - 1):
        if layer % interval == 0 and len(chosen) < kept:
            chosen.add(layer)
    return sorted(chosen)


def spread(marks: Sequence[int]) -> int:
    distances = [after - before for before, after in pairwise(marks)]
    return max(distances) - min(distances)


def test_unified_layers_are_those_of_the_paper_where_those_are_even() -> None:
    assert unified_layers(30, 6) == (0, 6, 12, 18, 24, 29)
    assert unified_layers(32, 16) == (*range(0, 30, 2), 31)
    assert unified_layers(30, 27) == tuple(layer for layer in range(30) if layer not in (7, 15, 22))
    taken = 0
    for num_layers in range(2, 49):
        for kept in range(2, num_layers + 1):
            layers = unified_layers(num_layers, kept)
            published = slow_unified(num_layers, num_layers / (kept + 1e-6))
            gone = [-1, *(layer for layer in range(num_layers) if layer not in published), num_layers]
            if spread(published) <= 1 and (len(gone) - 2 >= kept or spread(gone) <= 1):
                taken += 1
                assert list(layers) == published
    assert taken > 300


def test_unified_leaves_the_prompt_whole(six: Decoder) -> None:
    chosen = policy(six, "unified", 0.5)
    assert [chosen.layers_at(position, 2) for position in range(4)] == [tuple(range(6))] * 2 + [(0, 3, 5)] * 2


def test_skipdecode_falls_in_a_line_and_runs_bottom_and_top() -> None:
    schedule = SkipDecode(num_layers=8, most=7, fewest=3, warm_up=2, num_generated=5)
    assert [schedule.layers_at(position, 4) for position in (0, 3, 4)] == [(0, 1, 3, 4, 5, 6, 7)] * 3
    assert [len(schedule.layers_at(position, 4)) for position in range(4, 10)] == [7, 6, 5, 4, 3, 3]
    assert schedule.layers_at(8, 4) == (0, 1, 7)


@pytest.mark.parametrize("keep", [0.4, 0.5, 0.75, 0.9, 1.0])
def test_mean_depth_of_skipdecode_is_what_was_asked_for(six: Decoder, keep: float) -> None:
    chosen = policy(six, "skipdecode", keep, num_generated=101)
    depths = [len(chosen.layers_at(position, 0)) for position in range(101)]
    assert sum(depths) / 101 == pytest.approx(6 * keep, abs=0.5)
    assert depths == sorted(depths, reverse=True)


def test_segments_join_what_runs_equally_far() -> None:
    layers_of = [(0, 1, 2, 3), (0, 1, 2, 3), (0, 3), (0,)]
    assert segments(layers_of) == (Segment((0,), 4), Segment((1, 2), 2), Segment((3,), 3))


@pytest.mark.parametrize("layers_of", [[(0,), (0, 1)], [(0, 1, 2), (0, 2, 1)], [(0, 1), (0,), (0, 1)]])
def test_layers_that_come_back_are_refused(layers_of: Sequence[tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match="layers may only go"):
        segments(layers_of)


def test_help_lists_every_policy() -> None:
    assert all(entry.name in POLICIES for entry in OWN)
