"""Log-likelihoods in padded batches against a slow model that reads one text after the other."""

from collections.abc import Sequence
from typing import Any

import pytest
from slow_model import FfnRule, SlowModel
from tiny_decoders import ARCHITECTURES, model_of

from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import flop_of
from skippipe.inference.evaluation import scoring
from skippipe.inference.evaluation.scoring import Passage, batches, score
from skippipe.inference.policies.base import Policy, PolicyContext
from skippipe.inference.policies.construction import build_policy
from skippipe.model.skeleton import find_parts

TEXTS = [([5, 17, 3, 60, 22, 9], [4, 8]), ([44], [2, 50, 13, 9]), ([1, 2, 3], [40]), ([7, 7], [6, 61, 12])]
AFTER = 3


def decoder_and(architecture: str, name: str, keep: float = 0.6) -> tuple[Decoder, Policy]:
    decoder = Decoder(find_parts(model_of(architecture)))
    return decoder, build_policy(name, PolicyContext(decoder, keep)).sample(1).for_length(AFTER)


def passages(*, prompts: bool) -> list[Passage]:
    return [Passage(context, rest, len(context) if prompts else 0) for context, rest in TEXTS]


def slow_score(
    architecture: str, policy: Policy, passage: Passage, rule: FfnRule | None = None
) -> tuple[float, list[int]]:
    """Return the log-likelihood of the continuation and the likeliest tokens in its place."""
    tokens = [*passage.context, *passage.continuation]
    sets = [policy.layers_at(position, passage.prompt_length) for position in range(len(tokens))]
    logits = SlowModel(model_of(architecture)).logits(tokens[:-1], sets.__getitem__, rule)
    measured = logits[len(passage.context) - 1 :].double().log_softmax(dim=-1)
    likely = sum(float(row[token]) for row, token in zip(measured, passage.continuation, strict=True))
    return likely, [int(row.argmax()) for row in measured]


@pytest.mark.parametrize("name", ["full", "random", "unified", "skipdecode"])
@pytest.mark.parametrize(
    ("architecture", "prompts"),
    [*((architecture, True) for architecture in ARCHITECTURES), ("gpt2", False)],
    ids=[*ARCHITECTURES, "no prompts"],
)
def test_batch_equals_the_slow_model(architecture: str, prompts: bool, name: str) -> None:
    decoder, policy = decoder_and(architecture, name)
    scores, flop = score(decoder, policy, passages(prompts=prompts))
    whole = left = 0.0
    for passage, found in zip(passages(prompts=prompts), scores, strict=True):
        expected, _ = slow_score(architecture, policy, passage)
        assert found.log_likelihood == pytest.approx(expected, abs=1e-4)
        sets = [policy.layers_at(position, passage.prompt_length) for position in range(passage.length)]
        alone = flop_of(sets, decoder.num_layers, decoder.cost)
        whole, left = whole + alone.whole, left + alone.computed
    assert (flop.whole, flop.computed) == pytest.approx((whole, left))


@pytest.mark.parametrize(("architecture", "threshold"), [("llama", 0.85), ("gpt2", 0.9), ("gemma2", 0.92)])
def test_skipped_feed_forward_blocks_in_a_batch(architecture: str, threshold: float) -> None:
    rules: dict[str, Any] = {"first": 1, "last": 6, "warm_up": 1, "span": 2, "threshold": threshold}
    decoder, policy = decoder_and(
        architecture, "ffn-skip:" + ",".join(f"{key}={value}" for key, value in rules.items())
    )
    scores, flop = score(decoder, policy, passages(prompts=True))
    skipped = 0
    for passage, found in zip(passages(prompts=True), scores, strict=True):
        rule = FfnRule(**rules)
        expected, _ = slow_score(architecture, policy, passage, rule)
        assert found.log_likelihood == pytest.approx(expected, abs=1e-4)
        skipped += len(rule.skipped)
    assert skipped > 0
    assert flop.whole - flop.computed == pytest.approx(skipped * decoder.cost.ffn_flop)


def test_greedy_is_what_the_model_would_say() -> None:
    decoder, policy = decoder_and("llama", "unified")
    said: Sequence[int] = TEXTS[0][1]
    for _ in said:  # each pass makes one more token right
        said = slow_score("llama", policy, Passage(TEXTS[0][0], said, 6))[1]
    right, wrong = Passage(TEXTS[0][0], said, 6), Passage(TEXTS[0][0], [said[0], (said[1] + 1) % 64], 6)
    assert [found.is_greedy for found in score(decoder, policy, [right, wrong, right])[0]] == [True, False, True]


def test_batches_hold_every_passage_once_within_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, _ = decoder_and("llama", "full")
    many = [Passage([1] * (1 + 7 * number % 11), [2] * (1 + number % 3), 0) for number in range(40)]
    found = list(batches(decoder, many, 6))
    assert sorted(number for batch in found for number in batch) == list(range(40))
    lengths = [many[number].length for batch in found for number in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert max(map(len, found)) == 6
    monkeypatch.setattr(scoring, "MOST_LOGITS", 64 * 20)
    smaller = list(batches(decoder, many, 6))
    assert sorted(number for batch in smaller for number in batch) == list(range(40))
    for batch in smaller:
        first = min(len(many[number].context) for number in batch) - 1
        assert len(batch) == 1 or len(batch) * (max(many[number].length for number in batch) - first) <= 20
    assert len(smaller) > len(found)
