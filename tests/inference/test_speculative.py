"""Drafts at reduced depth that full depth checks: what comes out is greedy decoding at full depth."""

import random

import pytest
from tiny_decoders import ARCHITECTURES, decoder_of, model_of, tiny

from skippipe.errors import InputError
from skippipe.inference.decoder import Decoder
from skippipe.inference.generation.drafts.drafter import FixedDraft
from skippipe.inference.generation.generation import generate
from skippipe.inference.generation.speculative import speculate
from skippipe.inference.policies.base import FixedLayers
from skippipe.model.skeleton import find_parts

DRAFTS = [(0, 1, 2), (0, 1, 3, 5), (0, 2, 4), (5, 0), (0, 1, 2, 3, 4, 5)]
"""An exit, subsets with and without a common bottom, one in another order, and the whole model."""


def prompts(count: int) -> list[list[int]]:
    generator = random.Random(3)
    return [[generator.randrange(64) for _ in range(generator.randint(1, 7))] for _ in range(count)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_output_is_greedy_decoding(architecture: str) -> None:
    decoder = Decoder(find_parts(model_of(architecture)))
    whole = FixedLayers(decoder.all_layers)
    rates = set()
    for index, prompt in enumerate(prompts(35)):
        draft = DRAFTS[index % len(DRAFTS)]
        result = speculate(decoder, FixedDraft(decoder, draft, 1 + index % 4), [prompt], max_new_tokens=8)
        assert result.tokens == generate(decoder, whole, [prompt], max_new_tokens=8).tokens, (prompt, draft)
        rates.add(result.acceptance)
        if draft == decoder.all_layers:
            assert result.acceptance == 1
    assert len(rates) > 2, "drafts must be right at times and wrong at times"


def test_good_drafts_save_passes_of_the_whole_model() -> None:
    decoder = decoder_of(tiny("llama", num_hidden_layers=6))
    for layer in list(decoder.layers)[3:]:
        layer.get_parameter("self_attn.o_proj.weight").data *= 0
        layer.get_parameter("mlp.down_proj.weight").data *= 0
    result = speculate(decoder, FixedDraft(decoder, (0, 1, 2)), [[3, 4]], max_new_tokens=16)
    assert result.acceptance == 1
    assert result.checks == 3


def test_end_of_text_ends_in_the_middle_of_a_draft() -> None:
    decoder = Decoder(find_parts(model_of("llama")))
    drafter = FixedDraft(decoder, decoder.all_layers)
    whole = speculate(decoder, drafter, [[9, 8, 7]], max_new_tokens=12).tokens[0]
    end = whole[2]
    told: list[int] = []
    result = speculate(
        decoder,
        drafter,
        [[9, 8, 7]],
        max_new_tokens=12,
        eos_id=end,
        on_tokens=lambda tokens: told.extend(tokens.tolist()),
    )
    assert result.tokens[0] == told == whole[: whole.index(end) + 1]


def test_mistakes() -> None:
    decoder = Decoder(find_parts(model_of("llama")))
    with pytest.raises(InputError, match="at least one token"):
        FixedDraft(decoder, (0,), 0)
    with pytest.raises(InputError, match="context is 2048"):
        speculate(decoder, FixedDraft(decoder, (0,)), [[1] * 2048], max_new_tokens=3)
