"""Drafts at reduced depth that full depth checks: what comes out is greedy decoding at full depth."""

import random
from pathlib import Path
from typing import Literal

import pytest
from tiny_decoders import ARCHITECTURES, decoder_of, model_of, tiny
from transformers import PretrainedConfig

from skippipe import TextOptions, generate_texts
from skippipe.config.experiment_file import load_experiment
from skippipe.errors import InputError
from skippipe.inference.decoder import Decoder
from skippipe.inference.generation.drafts.drafter import FixedDraft
from skippipe.inference.generation.generation import generate
from skippipe.inference.generation.speculative import speculate
from skippipe.inference.model_loading import LoadedModel
from skippipe.inference.policies.base import FixedLayers
from skippipe.model.skeleton import find_parts

ROOT = Path(__file__).parents[2]
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


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "phi3"])
def test_an_answer_over_which_longrope_changes_its_factors_is_refused(architecture: str) -> None:
    decoder = decoder_of(with_longrope(architecture, border=10))
    draft = FixedDraft(decoder, (0, 1), 3)
    with pytest.raises(InputError, match="pass position 10, where the model's longrope"):
        speculate(decoder, draft, [[5, 17], [3] * 7], max_new_tokens=8)
    for prompt, count in ([3] * 4, 6), ([5, 17, 3] * 4, 8):
        plain = generate(decoder, FixedLayers(decoder.all_layers), [prompt], max_new_tokens=count).tokens
        assert speculate(decoder, draft, [prompt], max_new_tokens=count).tokens == plain


@pytest.mark.parametrize("num_drafted", [2, "auto"])
def test_it_is_refused_before_anything_is_printed(
    num_drafted: int | Literal["auto"], capsys: pytest.CaptureFixture[str]
) -> None:
    decoder = decoder_of(with_longrope("llama", border=10, vocab_size=257))
    experiment = load_experiment(ROOT / "configs" / "experiments" / "tiny.yaml")
    model = LoadedModel(decoder, "tiny", "as made here", experiment, None)
    with pytest.raises(InputError, match="pass position 10"):
        generate_texts(model, ["import"], TextOptions(max_new_tokens=6, num_drafted=num_drafted), stream=True)
    assert capsys.readouterr().out == ""
    assert generate_texts(model, ["import"], TextOptions(max_new_tokens=6)).num_tokens == 6


def with_longrope(architecture: str, border: int, **options: object) -> PretrainedConfig:
    """Return a model whose longrope takes other factors behind `border` positions; of gemma3, in some layers."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0 + index for index in range(8)], "factor": 4.0}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": border, **factors}
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    of_types = {"full_attention": rope, "sliding_attention": plain}
    options |= {"rope_parameters": of_types if architecture == "gemma3_text" else rope, "initializer_range": 0.3}
    if architecture == "phi3":
        options["original_max_position_embeddings"] = border
    return tiny(architecture, max_position_embeddings=40, **options)


def test_mistakes() -> None:
    decoder = Decoder(find_parts(model_of("llama")))
    with pytest.raises(InputError, match="at least one token"):
        FixedDraft(decoder, (0,), 0)
    with pytest.raises(InputError, match="context is 2048"):
        speculate(decoder, FixedDraft(decoder, (0,)), [[1] * 2048], max_new_tokens=3)
