"""Generation with a cache against transformers, and against a slow model without a cache."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from slow_model import SlowModel
from tiny_decoders import ARCHITECTURES, decoder_of, hugging_face, model_of, tiny
from training_runs import make_experiment, small_plan, train_alone
from transformers import GenerationConfig, PreTrainedModel

from skippipe import TextOptions, generate_texts
from skippipe.cli.main import main
from skippipe.config.experiment_file import load_experiment
from skippipe.errors import InputError
from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import Segment
from skippipe.inference.generation.drafts.drafter import FixedDraft
from skippipe.inference.generation.generation import Generated, generate
from skippipe.inference.generation.sampling import Sampling
from skippipe.inference.generation.speculative import speculate
from skippipe.inference.key_value_cache import RouteCache
from skippipe.inference.model_loading import LoadedModel
from skippipe.inference.policies.base import FixedLayers, Policy, PolicyContext
from skippipe.inference.policies.construction import build_policy
from skippipe.model.architecture_traits import ARCHITECTURES as EVERY
from skippipe.model.skeleton import find_parts

ROOT = Path(__file__).parents[2]
NEW = 8
PROMPTS = [[5, 17, 3, 60, 22, 9], [44], [1, 2, 3, 40]]


def decoder_and(architecture: str, name: str, keep: float, num_generated: int = NEW) -> tuple[Decoder, Policy]:
    decoder = Decoder(find_parts(model_of(architecture)))
    return decoder, build_policy(name, PolicyContext(decoder, keep, num_generated=num_generated)).sample(1)


def library(model: PreTrainedModel, prompts: Sequence[Sequence[int]], **options: object) -> list[list[int]]:
    """Return what transformers generates for a batch that is padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = GenerationConfig(max_new_tokens=NEW, use_cache=True, pad_token_id=0, **options)
    tokens: list[list[int]] = model.generate(ids, attention_mask=mask, generation_config=settings)[:, longest:].tolist()
    return tokens


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "batch"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_depth_is_what_transformers_generates(architecture: str, prompts: list[list[int]]) -> None:
    decoder, policy = decoder_and(architecture, "full", 1.0)
    generated = generate(decoder, policy, prompts, max_new_tokens=NEW)
    assert generated.tokens == library(model_of(architecture), prompts)
    assert (generated.share_of_prompt, generated.share_of_generated) == (1.0, 1.0)


@pytest.mark.parametrize("architecture", sorted(set(EVERY) - set(ARCHITECTURES)))
def test_every_architecture_generates_what_transformers_does(architecture: str) -> None:
    model = hugging_face(tiny(architecture, initializer_range=0.2))
    decoder = Decoder(find_parts(model))
    generated = generate(decoder, FixedLayers(decoder.all_layers), PROMPTS, max_new_tokens=NEW)
    assert generated.tokens == library(model, PROMPTS)
    part = FixedLayers((0, 2, 1))
    alone = [generate(decoder, part, [prompt], max_new_tokens=NEW).tokens[0] for prompt in PROMPTS]
    assert generate(decoder, part, PROMPTS, max_new_tokens=NEW).tokens == alone


def test_sampling_is_that_of_transformers() -> None:
    decoder, policy = decoder_and("llama", "full", 1.0)
    chosen: dict[str, Any] = {
        "do_sample": True,
        "temperature": 1.7,
        "top_k": 30,
        "top_p": 0.9,
        "repetition_penalty": 1.3,
    }
    ours = generate(decoder, policy, PROMPTS, max_new_tokens=NEW, sampling=Sampling(seed=11, **chosen)).tokens
    torch.manual_seed(11)
    assert ours == library(model_of("llama"), PROMPTS, **chosen)
    assert ours != generate(decoder, policy, PROMPTS, max_new_tokens=NEW).tokens


@pytest.mark.parametrize("name", ["random", "stages:0,3,2,5", "unified", "skipdecode", "exit"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parts_generate_what_a_slow_model_does(architecture: str, name: str) -> None:
    decoder, policy = decoder_and(architecture, name, 0.6)
    generated = generate(decoder, policy, PROMPTS[:1], max_new_tokens=NEW)
    length = len(PROMPTS[0])
    slow = SlowModel(model_of(architecture))
    assert generated.tokens[0] == slow.greedy(PROMPTS[0], NEW, lambda position: policy.layers_at(position, length))


@pytest.mark.parametrize("name", ["random", "unified", "skipdecode"])
def test_a_row_does_not_depend_on_the_others(name: str) -> None:
    decoder, policy = decoder_and("gemma2", name, 0.6)
    together = generate(decoder, policy, PROMPTS, max_new_tokens=NEW).tokens
    alone = [generate(decoder, policy, [prompt], max_new_tokens=NEW).tokens[0] for prompt in PROMPTS]
    assert together == alone


def test_cached_logits_equal_those_of_the_slow_model() -> None:
    decoder, policy = decoder_and("gemma2", "skipdecode", 0.6)
    tokens = [*PROMPTS[0], 7, 8, 9, 10]
    sets = [policy.layers_at(position, 6) for position in range(10)]
    cache = RouteCache(decoder.num_layers, 10)
    with torch.inference_mode():
        logits = [decoder.logits(torch.tensor([tokens[:6]]), [Segment(sets[0], 6)], cache=cache)[0]]
        for position in range(6, 10):
            step = decoder.logits(torch.tensor([[tokens[position]]]), [Segment(sets[position], 1)], cache=cache)
            logits.append(step[0])
    expected = SlowModel(model_of("gemma2")).logits(tokens, sets.__getitem__)
    torch.testing.assert_close(torch.cat(logits), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_that_was_left_out_cannot_come_back() -> None:
    decoder, _ = decoder_and("llama", "full", 1.0)
    cache = RouteCache(decoder.num_layers, 9)
    token = torch.tensor([[3]])
    decoder.logits(token, [Segment((0, 5), 1)], cache=cache)
    with pytest.raises(ValueError, match="layer 1 has served 0 positions, 1 are needed"):
        decoder.logits(token, [Segment((0, 1, 5), 1)], cache=cache)


class DeeperAfterPrompt(Policy):
    def layers_at(self, position: int, prompt_length: int) -> tuple[int, ...]:
        return (0, 5) if position < prompt_length else (0, 1, 5)


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        (DeeperAfterPrompt(), "layers 0, 1, 5 follow 0, 5: from one position to the next, layers may only go"),
        (FixedLayers((0, 6)), "layer 6: the model has 6 layers, counted from 0"),
    ],
)
def test_a_policy_that_no_model_can_follow_is_refused(policy: Policy, told: str) -> None:
    decoder, _ = decoder_and("llama", "full", 1.0)
    with pytest.raises(InputError, match=told):
        generate(decoder, policy, [[3]], max_new_tokens=2)


def test_rows_end_at_the_end_of_text_and_tokens_are_told_as_they_come() -> None:
    decoder, policy = decoder_and("llama", "full", 1.0)
    whole = generate(decoder, policy, PROMPTS, max_new_tokens=NEW).tokens
    end = whole[0][3]
    told: list[list[int]] = []
    ended = generate(
        decoder,
        policy,
        PROMPTS,
        max_new_tokens=NEW,
        eos_id=end,
        on_tokens=lambda tokens: told.append(tokens.tolist()),
    ).tokens
    assert ended == [row[: row.index(end) + 1] if end in row else row for row in whole]
    assert [column[0] for column in told][: len(ended[0])] == ended[0]
    alone = generate(decoder, policy, PROMPTS[:1], max_new_tokens=NEW, eos_id=end).tokens
    assert alone == ended[:1]


def test_each_of_several_ends_ends_a_row() -> None:
    decoder, policy = decoder_and("llama", "full", 1.0)
    whole = generate(decoder, policy, PROMPTS, max_new_tokens=NEW).tokens
    ends = [whole[0][3], whole[1][2]]
    ended = generate(decoder, policy, PROMPTS, max_new_tokens=NEW, eos_id=ends).tokens
    assert ended == [row[: next((i + 1 for i, token in enumerate(row) if token in ends), NEW)] for row in whole]
    assert {ended[0][-1], ended[1][-1]} <= set(ends)


def test_the_repetition_penalty_of_a_row_sees_no_padding() -> None:
    decoder, policy = decoder_and("llama", "full", 1.0)
    with torch.no_grad():
        decoder.skeleton.model.get_output_embeddings().weight[0] *= 3  # rows are padded with token 0: let it be likely
    options: dict[str, Any] = {"max_new_tokens": NEW, "sampling": Sampling(repetition_penalty=5.0)}
    try:
        together = generate(decoder, policy, PROMPTS, **options).tokens
        alone = [generate(decoder, policy, [prompt], **options).tokens[0] for prompt in PROMPTS]
    finally:
        with torch.no_grad():
            decoder.skeleton.model.get_output_embeddings().weight[0] /= 3
    assert together == alone
    assert any(0 in row for row in alone)


def test_longrope_reads_the_text_again_where_its_factors_change() -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0 + index for index in range(8)], "factor": 4.0}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 10, **factors}
    options = {"rope_parameters": rope, "original_max_position_embeddings": 10, "max_position_embeddings": 40}
    model = hugging_face(tiny("phi3", initializer_range=0.3, **options))
    decoder = Decoder(find_parts(model))
    policy = FixedLayers(decoder.all_layers)
    for prompt in ([5, 17, 3, 60, 22, 9], [1] * 9, [2] * 10, [3] * 11):
        found = generate(decoder, policy, [prompt], max_new_tokens=NEW).tokens
        assert found == library(model, [prompt]), prompt
    with pytest.raises(InputError, match="pass position 10, where the model's longrope"):
        speculate(decoder, FixedDraft(decoder, (0, 1)), [[1] * 6], max_new_tokens=NEW)


def test_a_token_that_the_model_does_not_know_is_refused() -> None:
    decoder, policy = decoder_and("llama", "full", 1.0)
    with pytest.raises(InputError, match="prompt 1: token 64, the model's vocabulary has 64"):
        generate(decoder, policy, [[63], [1, 64]], max_new_tokens=NEW)


def test_a_batch_ends_when_every_row_says_that_it_is_whole() -> None:
    decoder, policy = decoder_and("llama", "full", 1.0)
    whole = generate(decoder, policy, PROMPTS, max_new_tokens=NEW).tokens
    ends = [*(row[:2] for row in whole[:2]), whole[2][:4]]

    def is_end(row: Sequence[int]) -> bool:
        return any(list(row[: len(end)]) == end for end in ends)

    result = generate(decoder, policy, PROMPTS, max_new_tokens=NEW, is_end=is_end)
    assert result.tokens == [row[:4] for row in whole]


def test_share_counts_prompt_and_answer_apart() -> None:
    decoder, policy = decoder_and("llama", "unified", 0.5)
    generated = generate(decoder, policy, PROMPTS, max_new_tokens=NEW)
    assert (generated.share_of_prompt, generated.share_of_generated) == pytest.approx((1.0, 0.5))
    flop = decoder.cost.layer_flop
    of_prompts = 6 * sum(flop(position + 1) for prompt in PROMPTS for position in range(len(prompt)))
    of_answers = 6 * sum(flop(len(prompt) + step + 1) for prompt in PROMPTS for step in range(NEW - 1))
    assert generated.flop.whole == pytest.approx(of_prompts + of_answers)
    assert generated.flop.computed == pytest.approx(of_prompts + 0.5 * of_answers)


@pytest.mark.parametrize("max_new_tokens", [3, 4, 8])
def test_a_depth_that_shrinks_reaches_its_smallest_and_so_the_share(max_new_tokens: int) -> None:
    experiment = load_experiment(ROOT / "configs" / "experiments" / "tiny.yaml")
    decoder = decoder_of(tiny("llama", num_hidden_layers=6, vocab_size=257))
    model = LoadedModel(decoder, "tiny", "as made here", experiment, None)
    options = TextOptions("skipdecode", 0.5, max_new_tokens)
    result = generate_texts(model, ["import"], options).result
    assert isinstance(result, Generated)
    assert 0.48 < result.share_of_generated <= 0.5, "the last new token is not read"
    assert generate_texts(model, ["import"], replace(options, max_new_tokens=1)).num_tokens == 1


def test_what_does_not_fit_is_refused() -> None:
    decoder = Decoder(find_parts(model_of("llama")))
    decoder.config.max_position_embeddings = 8
    policy = FixedLayers(decoder.all_layers)
    for prompt, count, expected in [
        ([1] * 8, 1, "prompt 0: 8 tokens, the model's context is 8"),
        ([1] * 5, 4, "has room for 3"),
        ([], 1, "it is empty"),
    ]:
        with pytest.raises(InputError, match=expected):
            generate(decoder, policy, [prompt], max_new_tokens=count)
    decoder.config.max_position_embeddings = 2048


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generating")
    train_alone(make_experiment(folder, training={"max_steps": 2}), small_plan())
    return folder / "run"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["generate", *arguments])
    printed = capsys.readouterr()
    return int(stop.value.code or 0), printed.out, printed.err


def test_command_streams_one_prompt_and_prints_several(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [str(run_dir), "--max-new-tokens", "5", "--policy", "random", "--keep", "0.67"]
    code, streamed, summary = run(capsys, *options, "--prompt", "line 1 of")
    assert code == 0
    assert streamed.startswith("line 1 of")
    assert "66.7% for the prompt" in summary
    code, both, _ = run(capsys, *options, "--prompt", "line 1 of", "--prompt", "text")
    assert both.startswith(streamed.rstrip("\n"))
    code, printed, _ = run(capsys, *options, "--prompt", "line 1 of", "--json")
    assert "line 1 of" + json.loads(printed)["texts"][0]["text"] == streamed.removesuffix("\n")


def test_speculation_prints_what_full_depth_does(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [str(run_dir), "--max-new-tokens", "9", "--prompt", "line 1 of", "--prompt", "text 5 has"]
    _, full, _ = run(capsys, *options)
    code, speculated, summary = run(capsys, *options, "--speculative", "3", "--policy", "exit", "--keep", "0.5")
    assert code == 0
    assert speculated == full
    assert "drafted tokens were right" in summary
    code, speculated, summary = run(capsys, *options, "--speculative", "auto")
    assert code == 0
    assert speculated == full
    assert "lookups in the text" in summary


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prompt", "x", "--speculative", "many"], "not a valid"),
        (["--prompt", "x", "--speculative", "3", "--policy", "skipdecode", "--keep", "0.5"], "same whole layers"),
        (["--prompt", "x" * 2048], "prompt 0: 2048 tokens, the model's context is 2048"),
        (["--prompt", "x", "--max-new-tokens", "5000"], "has room for 2047"),
        (["--prompt", "x", "--policy", "exit", "--keep", "0.01"], "the smallest share is 0.17"),
        (["--prompt", "x", "--do-sample", "--temperature", "0"], "temperature"),
        (
            ["--prompt", "x", "--temperature", "0.5"],
            "--temperature 0.5: without --do-sample",
        ),
        (["--prompt", "x", "--do-sample", "--top-p", "1.5"], "top_p is 1.5; it is a probability"),
        (["--prompt", ""], "it is empty"),
        ([], "Missing option '--prompt'"),
    ],
)
def test_mistakes(run_dir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    code, _, message = run(capsys, str(run_dir), *arguments)
    assert code == 2
    assert expected in message
    assert "Traceback" not in message
