"""Drafts that choose themselves: the text stays that of full depth, and the choice is the one that gains most."""

import random

import pytest
import torch
from tiny_decoders import ARCHITECTURES, decoder_of, model_of, tiny
from torch import Tensor

from skippipe.inference.decoder import Decoder
from skippipe.inference.generation import speculative
from skippipe.inference.generation.checked_texts import CheckedTexts, DraftLayers
from skippipe.inference.generation.drafts import automatic_draft
from skippipe.inference.generation.drafts.automatic_draft import LOST_SHARE, AutomaticDraft
from skippipe.inference.generation.drafts.drafter import FixedDraft
from skippipe.inference.generation.drafts.gain import Chances, PassTimes, Speed, best_length, most_affordable
from skippipe.inference.generation.drafts.layer_search import LayerSearch
from skippipe.inference.generation.drafts.layer_watch import LayerWatch
from skippipe.inference.generation.drafts.lookup_draft import RepeatedText
from skippipe.inference.generation.generation import Prompts, generate
from skippipe.inference.generation.sampling import Sampling, TokenChoice
from skippipe.inference.generation.speculative import speculate
from skippipe.inference.policies.base import FixedLayers
from skippipe.model.layer_halves import index_of
from skippipe.model.skeleton import find_parts

NEW = 40


def prompts(count: int) -> list[list[int]]:
    generator = random.Random(7)
    return [[generator.randrange(64) for _ in range(generator.randint(2, 24))] for _ in range(count)]


def token_costs(monkeypatch: pytest.MonkeyPatch, share: float) -> tuple[list[float], list[int]]:
    """Have a pass take 1 and this share more for each drafted token; return the clock, and how many each pass had."""
    clock, counts, check = [0.0], list[int](), CheckedTexts.check

    def timed_check(texts: CheckedTexts, layers: DraftLayers | None, count: int) -> Tensor:
        clock[0] += 1 + share * count
        counts.append(count)
        return check(texts, layers, count)

    monkeypatch.setattr(CheckedTexts, "check", timed_check)
    for module in (automatic_draft, speculative):
        monkeypatch.setattr(module, "now_s", lambda device: clock[0])
    return clock, counts


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_output_is_greedy_decoding(architecture: str, rows: int) -> None:
    decoder = Decoder(find_parts(model_of(architecture)))
    asked = prompts(rows)
    told: list[list[int]] = []
    for given in ((), (0, 2, 3, 5)):
        drafter = AutomaticDraft(decoder, list(map(len, asked)), NEW, given)
        result = speculate(
            decoder, drafter, asked, max_new_tokens=NEW, on_tokens=lambda tokens: told.append(tokens.tolist())
        )
        expected = generate(decoder, FixedLayers(decoder.all_layers), asked, max_new_tokens=NEW).tokens
        assert result.tokens == expected
        assert result.tokens == [list(row) for row in zip(*told, strict=True)]
        told.clear()


@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_are_kept_from_lookups_or_layers_in_all_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    token_costs(monkeypatch, 0.01)
    decoder = decoder_of(tiny("llama", vocab_size=2, num_hidden_layers=2))
    asked = [[0, 1] * 6] * rows
    drafter = AutomaticDraft(decoder, list(map(len, asked)), 60)
    result = speculate(decoder, drafter, asked, max_new_tokens=60)
    assert result.accepted > 0
    assert sum(result.kept_from.values()) == result.accepted


@pytest.mark.parametrize("rows", [2, 3])
def test_rows_of_a_batch_keep_what_is_right_in_all(rows: int) -> None:
    decoder = Decoder(find_parts(model_of("llama")))
    asked = prompts(rows)
    whole = generate(decoder, FixedLayers(decoder.all_layers), asked, max_new_tokens=12)
    end = whole.tokens[0][4]
    expected = generate(decoder, FixedLayers(decoder.all_layers), asked, max_new_tokens=12, eos_id=end).tokens
    for draft in ((0, 1, 2), (0, 2, 4), decoder.all_layers):
        result = speculate(decoder, FixedDraft(decoder, draft, 3), asked, max_new_tokens=12, eos_id=end)
        assert result.tokens == expected
        assert result.acceptance < 1 or draft == decoder.all_layers


@pytest.mark.parametrize("idle", [range(4, 12), range(2, 10)], ids=["the top", "the middle"])
def test_search_leaves_out_what_adds_nothing(idle: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """An early exit where the top adds nothing, a subset where the middle does; all halves take the same time."""
    monkeypatch.setattr(LayerWatch, "half_times_s", (0.04, 0.04))
    decoder = decoder_of(tiny("llama", num_hidden_layers=12, initializer_range=0.2))
    for layer in idle:
        decoder.layers[layer].get_parameter("self_attn.o_proj.weight").data *= 0
        decoder.layers[layer].get_parameter("mlp.down_proj.weight").data *= 0
    texts = CheckedTexts(decoder, Prompts.of([list(range(30))], 4, decoder.device), 4)
    checks = PassTimes()
    for count in (1, 16):
        checks.add(count, 1.0)
    search = LayerSearch(decoder, checks, 16, 15)
    with torch.inference_mode():
        with search.watching():
            texts.append(texts.read(num_known=16).argmax(dim=-1))
        with search.watching():
            texts.append(texts.check(None, 0)[:, -1].argmax(dim=-1))
        texts.settle()
        before = texts.again(decoder.all_layers, slice(10, 20))
        for _ in range(4):
            search.go_on(texts, [True], rate=1.0)
        torch.testing.assert_close(texts.again(decoder.all_layers, slice(10, 20)), before, rtol=0, atol=0)
    assert search.found is not None
    kept = {index_of(layer) for layer in search.found.selection}
    assert kept.issuperset(set(range(12)) - set(idle))
    assert len(kept) < 9
    assert search.found.worth([True], 15, 1.0) > 1


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_penalty_and_draws_follow_the_model(penalty: float) -> None:
    """With a draft that is the whole model, every drafted token stays."""
    decoder = Decoder(find_parts(model_of("llama")))
    sampling = Sampling(do_sample=True, repetition_penalty=penalty, seed=5)
    drafter = FixedDraft(decoder, decoder.all_layers, 3)
    result = speculate(decoder, drafter, prompts(2), max_new_tokens=9, sampling=sampling)
    assert result.acceptance == 1
    greedy = Sampling(repetition_penalty=penalty)
    expected = generate(decoder, FixedLayers(decoder.all_layers), prompts(2), max_new_tokens=20, sampling=greedy)
    for drafts in (FixedDraft(decoder, (0, 1, 4)), AutomaticDraft(decoder, list(map(len, prompts(2))), 20)):
        found = speculate(decoder, drafts, prompts(2), max_new_tokens=20, sampling=greedy)
        assert found.tokens == expected.tokens


@pytest.mark.parametrize("drawn", [True, False])
def test_checked_tokens_are_distributed_as_the_model_says(drawn: bool) -> None:
    """Each share of 40,000 within 5 standard deviations; a draft stays as often as both distributions overlap."""
    count = 40_000
    model, draft = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]), torch.tensor([0.1, 0.3, 0.2, 0.2, 0.2])
    choice = TokenChoice(Sampling(do_sample=True, top_k=0, seed=3), [1], torch.device("cpu"))
    ids = torch.zeros(count, 1, dtype=torch.long)
    if drawn:
        drafted, chances = choice.draft(ids, draft.log().expand(count, -1))
        overlap = float(torch.minimum(model, draft).sum())
    else:
        drafted, chances = torch.ones(count, dtype=torch.long), None
        overlap = float(model[1])
    tokens, stays = choice.check(ids, model.log().expand(count, -1), drafted, chances)
    shares = torch.bincount(tokens, minlength=5) / count
    deviations = (model * (1 - model) / count).sqrt()
    assert ((shares - model).abs() <= 5 * deviations).all(), shares
    assert float(stays.float().mean()) == pytest.approx(overlap, abs=0.0125)
    assert (tokens[stays] == drafted[stays]).all()
    assert (tokens[~stays] != drafted[~stays]).all()


def test_drawn_texts_are_distributed_as_without_drafts() -> None:
    """The first three tokens of 3,000 texts with a vocabulary of 4, against exact probabilities."""
    decoder = decoder_of(tiny("llama", vocab_size=4, num_hidden_layers=2, initializer_range=0.6))
    rows, sampling = 3000, Sampling(do_sample=True, temperature=1.5, seed=11)
    with torch.inference_mode():
        every = torch.cartesian_prod(*[torch.arange(4)] * 3)  # (64, 3)
        texts = torch.cat([torch.tensor([[1, 2]]).expand(64, -1), every], dim=1)
        logits = decoder.head(decoder.run_layers(decoder.embed(texts), decoder.all_layers))[:, 1:4] / 1.5
        exact = logits.softmax(-1).gather(2, every.unsqueeze(2)).squeeze(2).prod(dim=1)  # (64,)
    for drafter in (FixedDraft(decoder, (0,), 2), AutomaticDraft(decoder, [2] * rows, 3)):
        result = speculate(decoder, drafter, [[1, 2]] * rows, max_new_tokens=3, sampling=sampling)
        found = torch.tensor(result.tokens) @ torch.tensor([16, 4, 1])
        counts = torch.bincount(found, minlength=64)
        chi_squared = float(((counts - rows * exact) ** 2 / (rows * exact)).sum())
        assert chi_squared < 63 + 5 * (2 * 63) ** 0.5, chi_squared


def test_length_is_where_one_more_token_is_not_worth_its_time() -> None:
    """Against the formula: (1 - a^(g + 1)) / (1 - a) tokens in g draft + check seconds."""
    chance, draft_s, check_s = 0.8, 0.2, 1.0
    seconds = [number * draft_s + check_s for number in range(16)]
    rates = [(1 - chance ** (number + 1)) / (1 - chance) / seconds[number] for number in range(16)]
    length, gain = best_length([chance] * 15, seconds.__getitem__, rate=max(rates))
    assert length == rates.index(max(rates))
    assert gain == pytest.approx(0.0)
    assert best_length([0.1] * 15, seconds.__getitem__, rate=1.0) == (0, 0.0)


def test_chances_follow_what_stays() -> None:
    chances = Chances([0.2, 0.8])
    assert (chances.of(0), chances.of(1), chances.mean) == (0.2, 0.8, 0.5)
    for _ in range(200):
        chances.add(0, stays=True)
    assert chances.of(0) > 0.95
    for _ in range(200):
        chances.add(0, stays=False)
    assert chances.of(0) < 0.1
    assert chances.of(1) == 0.8


def test_times_between_measured_ones_are_interpolated() -> None:
    times = PassTimes()
    assert times.seconds(3) == 0
    for duration_s in (9.0, 1.0, 1.2):
        times.add(1, duration_s)
    times.add(5, 2.0)
    assert [times.seconds(count) for count in (1, 3, 5, 9)] == pytest.approx([1.2, 1.6, 2.0, 2.0])
    assert [times.at_most_s(count) for count in (1, 3, 5, 9)] == pytest.approx([1.2, 1.6, 2.0, 2.8])


def test_a_single_time_is_that_of_each_token_at_most() -> None:
    times = PassTimes()
    times.add(1, 0.5)
    assert (times.seconds(4), times.at_most_s(4)) == (0.5, 2.0)
    times.add(2, 0.4)
    assert times.at_most_s(4) == 0.4


def test_speed_is_that_of_late_but_never_below_the_whole_model() -> None:
    speed = Speed()
    assert speed.rate(0.5) == 2
    speed.add(8, 1.0)
    assert speed.rate(0.5) == 8
    speed.add(1, 30.0)
    assert speed.rate(0.5) == 2


def test_as_many_tokens_are_drafted_as_may_be_lost() -> None:
    seconds = [1.0, 1.1, 1.2, 2.0].__getitem__
    assert [most_affordable(seconds, 3, may_take_s) for may_take_s in (0.9, 1.0, 1.15, 1.2, 5.0)] == [0, 0, 1, 2, 3]
    assert most_affordable(seconds, 0, 5.0) == 0


@pytest.mark.parametrize("seed", range(4))
def test_drafts_that_never_stay_lose_little(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are drawn at random, and each one more to check takes a fifth of a pass of the whole model."""
    clock, counts = token_costs(monkeypatch, 0.2)
    decoder, new = decoder_of(tiny("llama", vocab_size=16, num_hidden_layers=2)), 200
    prompt = [1, 2, 3, 4] * 6
    sampling = Sampling(do_sample=True, top_k=0, seed=seed)
    speculate(decoder, AutomaticDraft(decoder, [24], new), [prompt], max_new_tokens=new, sampling=sampling)
    assert sum(count > 0 for count in counts) >= 4  # one wrong draft does not end them
    assert clock[0] <= new - 1 + LOST_SHARE * new + 1e-9  # the prompts gave the first token


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([1, 2, 3], ([], 0)),
        ([1, 2, 3, 4, 1, 2, 3], ([4, 1, 2, 3], 3)),
        ([7, 1, 2, 5, 8, 1, 2], ([5, 8, 1, 2], 2)),
        ([5, 6, 5, 6, 5], ([6, 5, 6, 5], 3)),
        ([9, 9, 9], ([9, 9, 9, 9], 2)),
        ([1, 2, 1, 3, 1], ([3, 1, 3, 1], 1)),
    ],
)
def test_lookup_continues_as_the_text_did_before(text: list[int], expected: tuple[list[int], int]) -> None:
    repeated = RepeatedText()
    repeated.extend(text[:2])
    repeated.extend(text[2:])
    assert repeated.continuation(4) == expected
