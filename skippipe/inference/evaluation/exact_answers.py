"""Questions answered by a model under a policy, by greedy decoding; what counts is the exact answer."""

import math
from collections.abc import Iterator, Mapping, Sequence

from skippipe.errors import InputError
from skippipe.inference.depth_schedule import Flop
from skippipe.inference.evaluation.question_kinds import ExactQuestion
from skippipe.inference.generation.generation import generate, positions_after_prompt
from skippipe.inference.model_loading import LoadedModel
from skippipe.inference.policies.base import Policy
from skippipe.inference.prompt_tokenizer import PromptTokenizer
from skippipe.monitor.evaluation_results import TaskResult

BATCH_SIZE = 16
SPARE_TOKENS = 2
"""Beyond those of the longest right answer: the end of the line."""


class ExactAnswers:
    """Questions by kind, the same for all policies."""

    def __init__(self, model: LoadedModel, questions: Mapping[str, Sequence[ExactQuestion]]) -> None:
        """Raise `InputError` where they do not fit into the model's context."""
        self._model, self._tokenizer, self._questions = model, PromptTokenizer(model), questions
        for kind, asked in questions.items():
            longest = max(len(self._tokenizer.encode(question.prompt)) for question in asked)
            needed, context = longest + self._most_new_tokens(asked), model.decoder.context
            if needed > context:
                raise InputError(f"--questions: {kind} takes {needed} tokens, the model's context is {context}")

    def run(self, policy: Policy, name: str, keep: float | None) -> Iterator[TaskResult]:
        """Answer under a policy; yield the share of exact answers of each kind."""
        for kind, asked in self._questions.items():
            flop, right = Flop(), 0
            for first in range(0, len(asked), BATCH_SIZE):
                batch = asked[first : first + BATCH_SIZE]
                answers, computed = self._answers(policy.sample(first // BATCH_SIZE), batch)
                flop += computed
                right += sum(answer == question.answer for answer, question in zip(answers, batch, strict=True))
            share = right / len(asked)
            yield TaskResult(
                task=kind,
                policy=name,
                keep=flop.share if keep is None else keep,
                share_computed=flop.share,
                metric="exact_match",
                value=share,
                standard_error=math.sqrt(share * (1 - share) / len(asked)),
                documents=len(asked),
            )

    def _answers(self, policy: Policy, batch: Sequence[ExactQuestion]) -> tuple[list[str], Flop]:
        """Return the first line that the model writes after each prompt."""
        count = self._most_new_tokens(batch)
        generated = generate(
            self._model.decoder,
            policy.for_length(positions_after_prompt(count)),
            [self._tokenizer.encode(question.prompt) for question in batch],
            max_new_tokens=count,
            eos_id=self._tokenizer.end_ids,
            is_end=lambda row: "\n" in self._tokenizer.decode(row),
        )
        texts = (self._tokenizer.decode(row) for row in generated.tokens)
        return [text.partition("\n")[0].strip() for text in texts], generated.flop

    def _most_new_tokens(self, batch: Sequence[ExactQuestion]) -> int:
        return SPARE_TOKENS + max(
            len(self._tokenizer.encode(f" {question.answer}\n", add_special_tokens=False)) for question in batch
        )
