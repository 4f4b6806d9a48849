"""Questions made from a seed, and models that answer them."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny_decoders import decoder_of, tiny
from torch import nn

from skippipe.config.experiment_file import load_experiment
from skippipe.errors import InputError
from skippipe.inference.evaluation.exact_answers import SPARE_TOKENS, ExactAnswers
from skippipe.inference.evaluation.question_kinds import EXAMPLES, KINDS, ExactQuestion, questions
from skippipe.inference.model_loading import LoadedModel
from skippipe.inference.policies.base import FixedLayers, Policy

ROOT = Path(__file__).parents[2]
STARTS = {"copying": "text: ", "addition": "\n", "json_repair": "broken: "}
"""What the last question of a prompt stands behind."""


@pytest.fixture(scope="module")
def reciter() -> LoadedModel:
    """A model over bytes that says " yes" and a new line behind a colon: its layers are idle, and its head knows what
    follows each byte."""
    decoder = decoder_of(tiny("llama", vocab_size=257, num_hidden_layers=2, max_position_embeddings=90))
    for name, parameter in decoder.layers.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)
    embedding, head = (decoder.skeleton.model.get_submodule(name).weight for name in ("model.embed_tokens", "lm_head"))
    follows = {index: index for index in range(257)} | dict(zip(b": yes", b" yes\n", strict=True))
    with torch.no_grad():
        nn.init.orthogonal_(embedding)
        nn.init.zeros_(head)
        for byte, following in follows.items():
            head[following] += embedding[byte] / embedding[byte].norm()
    experiment = load_experiment(ROOT / "configs" / "experiments" / "tiny.yaml")
    return LoadedModel(decoder, "tiny", "as made here", experiment, None)


@pytest.mark.parametrize("kind", KINDS)
def test_questions_follow_from_the_seed_and_have_one_right_answer(kind: str) -> None:
    made = questions(kind, 40, seed=3)
    assert made[:7] == questions(kind, 7, seed=3)
    assert made != questions(kind, 40, seed=4)
    assert len(set(made)) == 40
    for question in made:
        shown, asked = question.prompt.rsplit(STARTS[kind], maxsplit=1)
        assert (shown + STARTS[kind]).count(STARTS[kind]) == EXAMPLES + (kind != "addition")
        if kind == "copying":
            assert asked.split("\n")[0] == question.answer
        elif kind == "addition":
            assert sum(map(int, asked.rstrip(" =").split("+"))) == int(question.answer)
        else:
            broken = asked.split("\n")[0]
            assert len(broken) == len(question.answer) - 1
            assert json.dumps(json.loads(question.answer)) == question.answer
            with pytest.raises(json.JSONDecodeError):
                json.loads(broken)


def test_exact_answers_are_counted_and_nothing_else(reciter: LoadedModel) -> None:
    asked = {
        "right": [ExactQuestion(f"{number} is right:", "yes") for number in range(18)],
        "some": [
            ExactQuestion("a longer one, is it right:", "yes"),
            ExactQuestion("is it:", "ye"),
            ExactQuestion("is it:", "yes!"),
        ],
        "silent": [ExactQuestion("is it", "yes")],
    }
    rows = {row.task: row for row in ExactAnswers(reciter, asked).run(FixedLayers((1,)), "stages:1", None)}
    assert [rows[kind].value for kind in asked] == pytest.approx([1, 1 / 3, 0])
    assert [rows[kind].documents for kind in asked] == [18, 3, 1]
    assert rows["some"].standard_error == pytest.approx((2 / 9 / 3) ** 0.5)
    assert {(row.metric, row.share_computed, row.keep) for row in rows.values()} == {("exact_match", 0.5, 0.5)}


def test_a_depth_is_spread_over_what_is_read_of_an_answer(reciter: LoadedModel) -> None:
    lengths = []

    @dataclass(frozen=True)
    class Spread(FixedLayers):
        def for_length(self, num_generated: int) -> Policy:
            lengths.append(num_generated)
            return self

    asked = {"right": [ExactQuestion("it is right:", "yes")]}
    list(ExactAnswers(reciter, asked).run(Spread((1,)), "spread", None))
    assert lengths == [len(b" yes\n") + SPARE_TOKENS - 1], "the last token is not read"


def test_questions_that_do_not_fit_are_refused(reciter: LoadedModel) -> None:
    with pytest.raises(InputError, match=r"--questions: copying takes \d+ tokens, the model's context is 90"):
        ExactAnswers(reciter, {"copying": questions("copying", 2, 0)})
