"""Which stages a calibration text says are cheapest to leave out."""

from itertools import pairwise

import pytest
import torch
from tiny_decoders import decoder_of, hugging_face, tiny
from torch import Tensor, nn

from skippipe.errors import InputError
from skippipe.inference.decoder import Decoder
from skippipe.inference.policies.base import PolicyContext
from skippipe.inference.policies.best.stage_scores import block_influence, gradient_similarity
from skippipe.inference.policies.construction import build_policy

TEXT = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(2))
STAGES = [(0, 1), (1, 3), (3, 4), (4, 6)]


def decoder(idle: tuple[int, ...] = (), num_layers: int = 6) -> Decoder:
    """Return a model whose layers `idle` add almost nothing."""
    made = decoder_of(tiny("llama", num_hidden_layers=num_layers, initializer_range=0.2), STAGES[: num_layers - 2])
    for layer in idle:
        made.layers[layer].get_parameter("self_attn.o_proj.weight").data *= 1e-3
        made.layers[layer].get_parameter("mlp.down_proj.weight").data *= 1e-3
    return made


@pytest.mark.parametrize("method", ["best:stages,cosine", "best:influence", "best:gradient"])
@pytest.mark.parametrize(("idle", "kept"), [((3,), (0, 1, 2, 4, 5)), ((1, 2), (0, 3, 4, 5))])
def test_idle_stages_are_left_out(method: str, idle: tuple[int, ...], kept: tuple[int, ...]) -> None:
    policy = build_policy(method, PolicyContext(decoder(idle), 0.75, calibration=lambda: TEXT))
    assert policy.layers_at(0, 0) == kept
    assert policy.num_stages == 3


def test_many_stages_are_judged_one_by_one() -> None:
    made = decoder_of(tiny("llama", num_hidden_layers=9, initializer_range=0.2))
    for layer in (2, 4, 5, 7):
        made.layers[layer].get_parameter("self_attn.o_proj.weight").data *= 1e-3
        made.layers[layer].get_parameter("mlp.down_proj.weight").data *= 1e-3
    policy = build_policy("best:gradient", PolicyContext(made, 5 / 9, calibration=lambda: TEXT))
    assert policy.layers_at(0, 0) == (0, 1, 3, 6, 8)


def test_influence_is_what_stages_turn_in_the_plain_model() -> None:
    made = decoder()
    with torch.no_grad():
        hidden = made.skeleton.model(input_ids=TEXT, output_hidden_states=True).hidden_states
    streams = [hidden[first] for first, _ in STAGES]
    expected = [1 - float(torch.cosine_similarity(before, after, dim=-1).mean()) for before, after in pairwise(streams)]
    assert block_influence(made, TEXT, made.stages)[:3] == pytest.approx(expected, abs=1e-5)


def test_similarity_is_the_correlation_of_gradients() -> None:
    made = decoder()
    config = tiny("llama", num_hidden_layers=6, initializer_range=0.2)

    def gradient(layers: list[int]) -> dict[int, Tensor]:
        model = hugging_face(config)
        model.model.layers = nn.ModuleList(model.model.layers[layer] for layer in layers)
        logits = model(input_ids=TEXT[:, :-1], use_cache=False).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), TEXT[:, 1:].flatten()).backward()
        grads = [[p.grad.flatten() for p in layer.parameters()] for layer in model.model.layers]
        return dict(zip(layers, map(torch.cat, grads), strict=True))

    whole, part = gradient([0, 1, 2, 3, 4, 5]), gradient([0, 3])
    expected = sum(float(torch.corrcoef(torch.stack([part[layer], whole[layer]]))[0, 1]) for layer in part) / 2
    similarity = gradient_similarity(made, TEXT, [(0, 2), (0, 1, 2, 3)])
    assert similarity == pytest.approx([expected, 1.0], abs=1e-4)


def test_everything_kept_needs_no_text() -> None:
    assert build_policy("best", PolicyContext(decoder(), 1.0)).layers_at(0, 0) == (0, 1, 2, 3, 4, 5)


def test_mistakes() -> None:
    with pytest.raises(InputError, match="best:influence and best:gradient"):
        build_policy("best:guess", PolicyContext(decoder(), 0.5))
    with pytest.raises(InputError, match="give --calibration FILE"):
        build_policy("best", PolicyContext(decoder(), 0.5))
