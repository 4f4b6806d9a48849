"""The choice among layers, or halves of layers, and what runs where a half is left out."""

import itertools

import pytest
import torch
from slow_model import SlowModel
from tiny_decoders import ARCHITECTURES, decoder_of, model_of, tiny
from torch.nn.functional import cosine_similarity

from skippipe.errors import InputError
from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import LayerSelection, Segment, layers_run, segments, share_computed
from skippipe.inference.evaluation.layer_drawing import draw_layers
from skippipe.inference.generation.drafts.drafter import FixedDraft
from skippipe.inference.generation.generation import generate
from skippipe.inference.generation.speculative import speculate
from skippipe.inference.policies.base import FixedLayers, PolicyContext
from skippipe.inference.policies.best.nearest_subsets import nearest_subsets
from skippipe.inference.policies.best.part_costs import half_flops, half_parts, half_times, layer_parts, selection_of
from skippipe.inference.policies.construction import build_policy
from skippipe.model.layer_halves import HalfLayer
from skippipe.model.skeleton import find_parts

TEXT = torch.randint(0, 64, (2, 13), generator=torch.Generator().manual_seed(2))
HALVED: LayerSelection = (0, HalfLayer(1, "attention"), HalfLayer(2, "feed_forward"), 3, HalfLayer(4, "feed_forward"))


def decoder(num_layers: int, idle: tuple[int, ...] = ()) -> Decoder:
    """Return a model whose layers `idle` add almost nothing."""
    made = decoder_of(tiny("llama", num_hidden_layers=num_layers, initializer_range=0.2))
    for layer in idle:
        made.layers[layer].get_parameter("self_attn.o_proj.weight").data *= 1e-3
        made.layers[layer].get_parameter("mlp.down_proj.weight").data *= 1e-3
    return made


def loss(made: Decoder, layers: LayerSelection) -> float:
    with torch.inference_mode():
        return float(made.loss(TEXT[:, :-1], TEXT[:, 1:], [Segment(layers, TEXT.shape[1] - 1)]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_halves_of_layers_run_as_in_a_slow_model(architecture: str) -> None:
    model = model_of(architecture)
    made, slow = Decoder(find_parts(model)), SlowModel(model)
    tokens = TEXT[0, :8].tolist()
    with torch.inference_mode():
        logits = made.logits(TEXT[:1, :8], segments([HALVED] * 8))
    torch.testing.assert_close(logits[0], slow.logits(tokens, lambda position: HALVED), rtol=1e-5, atol=1e-5)
    generated = generate(made, FixedLayers(HALVED), [tokens], max_new_tokens=4)
    assert generated.tokens[0] == slow.greedy(tokens, 4, lambda position: HALVED)
    drafted = speculate(made, FixedDraft(made, HALVED, 2), [tokens], max_new_tokens=6)
    assert drafted.tokens == generate(made, FixedLayers(made.all_layers), [tokens], max_new_tokens=6).tokens


def test_halves_are_counted_and_drawn() -> None:
    made = decoder(6)
    assert layers_run(HALVED) == 3.5
    attention, feed_forward = half_flops(made, 1)
    assert attention + feed_forward == made.cost.layer_flop(1)
    expected = (3 * attention + 4 * feed_forward) / (6 * made.cost.layer_flop(1))
    assert share_computed([HALVED], 6, made.cost) == pytest.approx(expected)
    assert draw_layers(FixedLayers(HALVED), made, [0], 0) == "#af#f."


@pytest.mark.parametrize("budget", [2.0, 3.0])
def test_the_programme_finds_the_nearest_subset_where_nothing_is_dropped(budget: float) -> None:
    made = decoder(5)
    parts, ids = layer_parts(made), TEXT[:1, :6]
    with torch.inference_mode():
        embedded = made.embed(ids)
        whole = made.run_layers(embedded, made.all_layers)
        nearness = {
            subset: float(cosine_similarity(made.run_layers(embedded, subset), whole, dim=-1).mean())
            for subset in itertools.combinations(range(5), int(budget))
        }
    assert nearest_subsets(made, ids, parts, budget, width=99)[0] == max(nearness, key=nearness.__getitem__)
    assert selection_of(parts, (0, 3)) == (0, 3)


@pytest.mark.parametrize("unit", ["layers", "halves"])
@pytest.mark.parametrize("keep", [0.9, 0.8, 0.7, 0.6, 0.5])
def test_best_is_at_least_as_good_as_what_it_starts_from(unit: str, keep: float) -> None:
    made = decoder(12)
    context = PolicyContext(made, keep, calibration=lambda: TEXT)
    chosen = build_policy(f"best:{unit},tries=4", context).layers_at(0, 0)
    spread = build_policy("unified", context).layers_at(9, 0)
    by_influence = build_policy("best:influence", context).layers_at(0, 0)
    assert loss(made, chosen) <= min(loss(made, spread), loss(made, by_influence)) + 1e-6
    assert share_computed([chosen] * 12, 12, made.cost) <= round(12 * keep) / 12 + 1e-9
    assert list(chosen) == list(dict.fromkeys(chosen))


@pytest.mark.parametrize("unit", ["layers", "halves"])
def test_a_share_below_one_stage_is_reached(unit: str) -> None:
    made = decoder_of(tiny("llama", num_hidden_layers=6, initializer_range=0.2), [(0, 3), (3, 6)])
    context = PolicyContext(made, 0.2, calibration=lambda: TEXT)
    chosen = build_policy(f"best:{unit},tries=4", context).layers_at(0, 0)
    assert 0 < share_computed([chosen] * 12, 6, made.cost) <= 1 / 6 + 1e-9
    for policy, smallest in (f"best:{unit}", "0.17"), ("best:stages", "0.50"):
        with pytest.raises(InputError, match=f"the smallest share is {smallest}"):
            build_policy(policy, context.with_keep(0.05))


def test_idle_layers_and_halves_are_left_out() -> None:
    made = decoder(8, idle=(2, 5))
    context = PolicyContext(made, 0.75, calibration=lambda: TEXT)
    assert build_policy("best:cosine", context).layers_at(0, 0) == (0, 1, 3, 4, 6, 7)
    made = decoder(6)
    for layer in (1, 3):
        made.layers[layer].get_parameter("mlp.down_proj.weight").data *= 1e-3
        made.layers[layer + 1].get_parameter("self_attn.o_proj.weight").data *= 1e-3
    parts = half_parts(made, (1.0, 1.0))
    subset = nearest_subsets(made, TEXT[:, :-1], parts, 8.0, width=4)[0]
    halves = [HalfLayer(layer, "attention" if layer in (1, 3) else "feed_forward") for layer in range(1, 5)]
    assert selection_of(parts, subset) == (0, *halves, 5)


def test_halves_are_timed() -> None:
    attention_s, feed_forward_s = half_times(decoder(2), 6)
    assert 0 < attention_s < 1
    assert 0 < feed_forward_s < 1


@pytest.mark.parametrize(
    ("specification", "expected"),
    [
        ("best:layer", "did you mean 'layers'"),
        ("best:halves,stages", "say one of"),
        ("best:time", "time is for halves"),
        ("best:tries=few", "expected a whole number"),
        ("best:tries=nan", "'tries=nan': expected a whole number after tries="),
        ("best:width=1.5", "'width=1.5': expected a whole number after width="),
        ("best:width=0", "a width from 1"),
    ],
)
def test_mistakes_are_named(specification: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        build_policy(specification, PolicyContext(decoder(2), 0.5, calibration=lambda: TEXT))
