"""What the text of each policy promises, at nine shares of models of four depths."""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_decoders import decoder_of, tiny

from skippipe.errors import InputError
from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import LayerSelection
from skippipe.inference.evaluation.layer_drawing import draw_layers
from skippipe.inference.policies.base import Policy, PolicyContext
from skippipe.inference.policies.construction import build_policy
from skippipe.model.layer_halves import LayerOrHalf

DEPTHS = (6, 12, 30, 32)
SHARES = tuple(tenths / 10 for tenths in range(9, 0, -1))
TEXT = torch.randint(0, 64, (1, 6), generator=torch.Generator().manual_seed(2))


@cache
def deep(num_layers: int) -> Decoder:
    return decoder_of(tiny("llama", num_hidden_layers=num_layers, initializer_range=0.2))


def at_shares(name: str, num_layers: int, **options: Any) -> Iterator[tuple[float, Policy]]:
    """Yield the policy at each share that it can reach, the largest first; it can reach all from some share on."""
    refused = False
    for share in SHARES:
        try:
            policy = build_policy(name, PolicyContext(deep(num_layers), share, **options))
        except InputError as error:
            refused = "the smallest share is" in str(error)
            if not refused:
                raise
        else:
            assert not refused
            yield share, policy


def whole(layers: LayerSelection) -> list[int]:
    assert all(isinstance(layer, int) for layer in layers)
    return [layer for layer in layers if isinstance(layer, int)]


def left_out(layers: Sequence[LayerOrHalf], num_layers: int) -> list[int]:
    return [layer for layer in range(num_layers) if layer not in layers]


@pytest.mark.parametrize("num_layers", DEPTHS)
def test_unified_spreads_what_it_leaves_out(num_layers: int) -> None:
    before = num_layers
    for share, policy in at_shares("unified", num_layers):
        layers = whole(policy.layers_at(5, 5))
        assert policy.layers_at(4, 5) == tuple(range(num_layers)), "the prompt is read in full"
        assert (layers[0], layers[-1]) == (0, num_layers - 1)
        assert num_layers * share - 1 < len(layers) <= num_layers * share + 1e-9
        assert len(layers) <= before
        before = len(layers)
        gone = left_out(layers, num_layers)
        kept_apart, gone_apart = (
            [after - before for before, after in pairwise(row)] for row in (layers, [-1, *gone, num_layers])
        )
        assert max(kept_apart) - min(kept_apart) <= 1
        if len(gone) < len(layers):
            assert min(gone_apart) > 1, "no two layers side by side are left out"
            assert max(gone_apart) - min(gone_apart) <= 1


@pytest.mark.parametrize("num_layers", DEPTHS)
@pytest.mark.parametrize("name", ["exit", "random", "best:influence"])
def test_a_share_is_the_nearest_number_of_layers(name: str, num_layers: int) -> None:
    before = set(range(num_layers))
    for share, policy in at_shares(name, num_layers, calibration=lambda: TEXT):
        layers = whole(policy.sample(3).layers_at(0, 0))
        assert abs(len(layers) - num_layers * share) <= 0.5
        assert layers == sorted(set(layers))
        assert layers[0] == 0, "the first layer always runs"
        if name == "exit":
            assert layers == list(range(len(layers)))
        if name == "best:influence":
            assert before.issuperset(layers), "what a smaller share keeps, a larger one keeps too"
        before = set(layers)


@pytest.mark.parametrize("num_layers", DEPTHS)
def test_skipdecode_runs_fewer_layers_for_later_tokens(num_layers: int) -> None:
    for share, policy in at_shares("skipdecode", num_layers, num_generated=41):
        selections = [policy.layers_at(position, 10) for position in range(51)]
        depths = [len(layers) for layers in selections]
        assert depths == sorted(depths, reverse=True)
        assert len(set(selections[:11])) == 1, "the prompt runs at the largest depth"
        assert sum(depths[10:]) / 41 == pytest.approx(num_layers * share, abs=0.51)
        for layers in selections:
            gone = left_out(layers, num_layers)
            assert (layers[0], layers[-1]) == (0, num_layers - 1)
            assert gone == list(range(1, 1 + len(gone))), "one block behind the warm-up is left out"


def test_layers_are_drawn_as_they_run() -> None:
    drawn = {
        name: draw_layers(policy, deep(12), range(10, 14), 10)
        for name, keep in {"full": 1.0, "exit": 0.5, "unified": 0.8, "random": 0.5, "skipdecode": 0.5}.items()
        for policy in [build_policy(name, PolicyContext(deep(12), keep, num_generated=4))]
    }
    assert drawn == {
        "full": "############",
        "exit": "######......",
        "unified": "##.###.##.##",
        "random": "#+++++++++++",
        "skipdecode": "#..++++++++#",
    }
