"""Skipped feed-forward blocks against a slow model, in batches and with a cache, and calibrated shares."""

from collections.abc import Sequence

import pytest
import torch
from slow_model import FfnRule, SlowModel
from tiny_decoders import decoder_of, model_of, tiny
from torch import Tensor

from skippipe.errors import InputError
from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import Segment, share_computed
from skippipe.inference.ffn_skipping import FfnSkipping
from skippipe.inference.generation.generation import generate
from skippipe.inference.policies.base import Policy, PolicyContext
from skippipe.inference.policies.construction import build_policy
from skippipe.model.architecture_traits import ARCHITECTURES
from skippipe.model.skeleton import find_parts

ROWS = torch.randint(0, 64, (3, 14), generator=torch.Generator().manual_seed(5))
RULE = {"first": 1, "last": 6, "warm_up": 2, "span": 2}
THRESHOLDS = {"llama": 0.85, "gpt2": 0.9, "gemma2": 0.92}
"""Where some tokens skip and others do not."""


def policy_of(decoder: Decoder, threshold: float) -> Policy:
    argument = ",".join(f"{key}={value}" for key, value in {**RULE, "threshold": threshold}.items())
    return build_policy(f"ffn-skip:{argument}", PolicyContext(decoder, 0.5))


def run(decoder: Decoder, policy: Policy, rows: Tensor) -> tuple[Tensor, float]:
    """Return the logits and the share that was skipped."""
    with policy.installed(decoder) as meter, torch.inference_mode():
        assert isinstance(meter, FfnSkipping)
        meter.begin(torch.arange(rows.shape[1]).expand_as(rows))
        logits = decoder.logits(rows, [Segment(decoder.all_layers, rows.shape[1])])
    layers_of = [decoder.all_layers] * rows.shape[1]
    skipped = meter.skipped_flop / len(rows)
    return logits, 1 - share_computed(layers_of, decoder.num_layers, decoder.cost, skipped_flop=skipped)


@pytest.mark.parametrize("architecture", THRESHOLDS)
def test_batches_equal_one_token_at_a_time(architecture: str) -> None:
    threshold = THRESHOLDS[architecture]
    decoder, slow = Decoder(find_parts(model_of(architecture))), SlowModel(model_of(architecture))
    logits, share = run(decoder, policy_of(decoder, threshold), ROWS)
    counts = []
    for row in range(len(ROWS)):
        rule = FfnRule(**RULE, threshold=threshold)
        expected = slow.logits(ROWS[row].tolist(), lambda position: range(6), rule)
        torch.testing.assert_close(logits[row], expected, rtol=1e-5, atol=1e-5)
        counts.append(len(rule.skipped))
    assert len(set(counts)) > 1, "rows must differ, or the masks are not tested"
    assert 0 < sum(counts) < 0.8 * len(ROWS) * 12 * 4
    flop = [decoder.cost.layer_flop(position + 1) for position in range(14)]
    assert share == pytest.approx(sum(counts) * decoder.cost.ffn_flop / (3 * 6 * sum(flop)))


@pytest.mark.parametrize("architecture", THRESHOLDS)
def test_generation_equals_the_slow_model(architecture: str) -> None:
    threshold = THRESHOLDS[architecture]
    decoder, slow = Decoder(find_parts(model_of(architecture))), SlowModel(model_of(architecture))
    prompts = [ROWS[0, :9].tolist(), ROWS[1, :4].tolist(), ROWS[2, :1].tolist()]
    generated = generate(decoder, policy_of(decoder, threshold), prompts, max_new_tokens=7)
    skipped = whole = 0.0
    for prompt, tokens in zip(prompts, generated.tokens, strict=True):
        assert tokens == slow.greedy(prompt, 7, lambda position: range(6), FfnRule(**RULE, threshold=threshold))
        rule = FfnRule(**RULE, threshold=threshold)
        slow.logits([*prompt, *tokens[:-1]], lambda position: range(6), rule)
        skipped += sum(decoder.cost.ffn_flop for position, _ in rule.skipped if position >= len(prompt))
        whole += 6 * sum(decoder.cost.layer_flop(len(prompt) + step + 1) for step in range(6))
    assert generated.share_of_generated == pytest.approx(1 - skipped / whole)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_kept_is_full_depth_to_the_bit_and_leaves_nothing_behind(architecture: str) -> None:
    decoder = decoder_of(tiny(architecture))
    full = decoder.skeleton.model(input_ids=ROWS).logits
    logits, skipped = run(decoder, build_policy("ffn-skip", PolicyContext(decoder, 1.0)), ROWS)
    assert torch.equal(logits, full)
    assert skipped == 0
    logits, skipped = run(decoder, policy_of_all(decoder), ROWS)
    assert skipped > 0
    assert not torch.allclose(logits, full)
    assert torch.equal(decoder.skeleton.model(input_ids=ROWS).logits, full)


def policy_of_all(decoder: Decoder) -> Policy:
    """Return the policy that skips every block it may."""
    return build_policy("ffn-skip:first=0,last=4,warm_up=0,span=3,threshold=-1", PolicyContext(decoder, 0.5))


@pytest.mark.parametrize("architecture", ["olmo2", "gpt_neox", "granite", "mixtral"])
def test_the_residual_stream_is_seen_in_every_kind_of_layer(architecture: str) -> None:
    """With all later blocks skipped, the stream before a block is what comes out when that block adds nothing."""
    decoder = decoder_of(tiny(architecture))
    policy = build_policy("ffn-skip:first=2,last=3,warm_up=0,span=1,threshold=2", PolicyContext(decoder, 0.5))
    with torch.inference_mode():
        hidden = decoder.run_layers(decoder.embed(ROWS), (0, 1))
        after = decoder.run_layers(hidden, (2,))
        with build_policy(
            "ffn-skip:first=1,last=3,warm_up=0,span=1,threshold=-1", PolicyContext(decoder, 0.5)
        ).installed(decoder) as meter:
            assert isinstance(meter, FfnSkipping)
            meter.begin(torch.arange(14).expand_as(ROWS))
            meter._left = torch.ones_like(ROWS)  # as if layer 1 had said so
            meter._none_left = False
            before = decoder.run_layers(hidden, (2,))
        with policy.installed(decoder) as meter:
            assert isinstance(meter, FfnSkipping)
            meter.cosines = {}
            meter.begin(torch.arange(14).expand_as(ROWS))
            decoder.run_layers(hidden, (2,))
    expected = torch.nn.functional.cosine_similarity(before, after, dim=-1)
    torch.testing.assert_close(meter.cosines[2], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", [0.9, 0.75, 0.6])
def test_calibration_meets_the_share(keep: float) -> None:
    decoder = decoder_of(tiny("llama", num_hidden_layers=12, intermediate_size=128, initializer_range=0.2))
    text = torch.randint(0, 64, (4, 65), generator=torch.Generator().manual_seed(1))
    policy = build_policy("ffn-skip", PolicyContext(decoder, keep, calibration=lambda: text))
    assert 1 - run(decoder, policy, text[:, :-1])[1] == pytest.approx(keep, abs=0.02)


def test_what_cannot_be_had_is_refused() -> None:
    decoder = decoder_of(tiny("llama"))
    text = ROWS

    def refuse(specification: str, keep: float, expected: str, calibrated: Sequence[bool] = (True,)) -> None:
        context = PolicyContext(decoder, keep, calibration=(lambda: text) if calibrated[0] else None)
        with pytest.raises(InputError, match=expected):
            build_policy(specification, context)

    refuse("ffn-skip", 0.2, "keeps at least 0")
    refuse("ffn-skip", 0.8, "give --calibration FILE", (False,))
    refuse("ffn-skip:first=3,last=3,threshold=0", 0.8, "no region")
    for layer in decoder.layers:
        layer.add_module("mix", layer.get_submodule("mlp"))
        del layer.mlp
    refuse("ffn-skip", 0.8, "no feed-forward block apart from the rest")
