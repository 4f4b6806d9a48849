"""A model under a policy as EleutherAI's lm-eval sees models, so that its tasks run with parts left out.

A task's context is the prompt, which some policies read in full; its continuation, or what is generated, is what comes
after. Texts that are measured from their start on (rolling log-likelihoods) have no prompt. Where a policy draws at
random, all that a task asks about one document meets the same draw.
"""

import json
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from skippipe.errors import InputError
from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import Flop
from skippipe.inference.evaluation.scoring import Passage, Score, batches, score
from skippipe.inference.generation.generation import generate, positions_after_prompt
from skippipe.inference.generation.sampling import Sampling
from skippipe.inference.policies.base import Policy
from skippipe.inference.prompt_tokenizer import PromptTokenizer

DEFAULT_NEW_TOKENS = 256
"""What a task may generate where it does not say; lm-eval's own models have the same."""
SAMPLING_OPTIONS = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
CHANGES_NOTHING = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}

Key = TypeVar("Key", bound=Hashable)


class PolicyModel(TemplateLM):  # type: ignore[misc]  # lm-eval is optional and has no types
    """A decoder under a policy."""

    def __init__(self, decoder: Decoder, tokenizer: PromptTokenizer, policy: Policy, *, batch_size: int) -> None:
        super().__init__()
        self._decoder, self._tokenizer, self._policy = decoder, tokenizer, policy
        self._batch_size = batch_size
        self.flop: defaultdict[str, Flop] = defaultdict(Flop)
        """What the requests of each task took, by its name."""

    @property
    def max_length(self) -> int:
        """The most positions of the model."""
        return self._decoder.context

    @property
    def eot_token_id(self) -> int:
        """The end of text."""
        return self._known(self._tokenizer.eos_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        bos_id = self._tokenizer.bos_id
        return bos_id if bos_id is not None else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text; one that spells the special token it starts with gets no second one."""
        ids = self._tokenizer.encode(string, add_special_tokens=add_special_tokens is not False)
        bos_id = self._tokenizer.bos_id
        doubled = add_special_tokens is None and bos_id is not None and ids[:2] == [bos_id, bos_id]
        return ids[1:] if doubled else ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is what greedy decoding says."""
        passages = [self._passage(request) for request in requests]
        return [(found.log_likelihood, found.is_greedy) for found in self._scores(requests, passages, disable_tqdm)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in windows as long as the model's context."""
        owners: list[int] = []
        passages = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            for context, continuation in map(make_disjoint_window, windows):
                owners.append(number)
                passages.append(Passage(context, continuation, prompt_length=0))
        scores = self._scores([requests[owner] for owner in owners], passages, disable_tqdm)
        sums = [0.0] * len(requests)
        for owner, found in zip(owners, scores, strict=True):
            sums[owner] += found.log_likelihood
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what follows each context, up to the first of the request's stop sequences."""
        texts: dict[int, str] = {}
        keys = [
            (request.task_name, self._sampled(request), json.dumps(request.args[1], sort_keys=True))
            for request in requests
        ]
        with tqdm(total=len(requests), desc="generating", disable=disable_tqdm) as progress:
            for (task, policy, _), numbers in _grouped(keys).items():
                options = _GenerationOptions(requests[numbers[0]].args[1], task, self.max_length)
                prompts = {number: self._prompt(requests[number].args[0], options) for number in numbers}
                numbers.sort(key=lambda number: -len(prompts[number]))
                for first in range(0, len(numbers), self._batch_size):
                    batch = numbers[first : first + self._batch_size]
                    made = self._generated(task, policy, [prompts[number] for number in batch], options, seed=first)
                    texts |= zip(batch, made, strict=True)
                    progress.update(len(batch))
        return [texts[number] for number in range(len(requests))]

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError("`loglikelihood` scores requests with their documents")

    def _generated(
        self, task: str, policy: Policy, prompts: Sequence[list[int]], options: "_GenerationOptions", seed: int
    ) -> list[str]:
        decode = self._tokenizer.decode  # of the answer alone, as lm-eval's own model does
        result = generate(
            self._decoder,
            policy.for_length(positions_after_prompt(options.max_new_tokens)),
            prompts,
            max_new_tokens=options.max_new_tokens,
            sampling=Sampling(**options.sampling, seed=seed),
            eos_id=self._tokenizer.end_ids,
            is_end=lambda tokens: any(stop in decode(tokens) for stop in options.stops),
        )
        self.flop[task] += result.flop
        return [postprocess_generated_text(decode(tokens), options.stops, None) for tokens in result.tokens]

    def _scores(self, requests: Sequence[Instance], passages: Sequence[Passage], quiet: bool) -> list[Score]:
        keys = [
            (request.task_name, self._sampled(request).for_length(max(passage.num_after_prompt, 1)))
            for request, passage in zip(requests, passages, strict=True)
        ]
        scores: dict[int, Score] = {}
        with tqdm(total=len(passages), desc="scoring", disable=quiet) as progress:
            for (task, policy), numbers in _grouped(keys).items():
                of_key = [passages[number] for number in numbers]
                for batch in batches(self._decoder, of_key, self._batch_size):
                    found, flop = score(self._decoder, policy, [of_key[place] for place in batch])
                    scores |= zip((numbers[place] for place in batch), found, strict=True)
                    self.flop[task] += flop
                    progress.update(len(batch))
        return [scores[number] for number in range(len(passages))]

    def _sampled(self, request: Instance) -> Policy:
        return self._policy.sample(request.doc_id or 0)

    def _passage(self, request: Instance) -> Passage:
        """Return the request's tokens, the context cut from the left where both do not fit."""
        text, following = request.args
        if text:
            context, continuation = self._encode_pair(text, following)
        else:
            context, continuation = [self.prefix_token_id], self.tok_encode(following, add_special_tokens=False)
            if continuation[:1] == context:
                continuation = continuation[1:]
        room = self.max_length + 1 - len(continuation)  # the last token is not read
        if not continuation or room < 1:
            raise InputError(
                f"task {request.task_name}, document {request.doc_id}: the continuation {following[:40]!r} has "
                f"{len(continuation)} tokens of its own; between 1 and {self.max_length} can be measured"
            )
        return Passage(context[-room:], continuation, prompt_length=len(context[-room:]))

    def _prompt(self, text: str, options: "_GenerationOptions") -> list[int]:
        """Return the end of the context that leaves room for the answer."""
        tokens = self.tok_encode(text) or [self.prefix_token_id]
        return tokens[options.max_new_tokens - self.max_length :]

    def _known(self, token_id: int | None) -> int:
        if token_id is None:
            raise InputError("the model's tokenizer has neither a first nor a last token, which lm-eval needs")
        return token_id


class _GenerationOptions:
    """What a task asks of generation."""

    def __init__(self, asked: dict[str, Any], task: str, context: int) -> None:
        options: dict[str, Any] = dict(normalize_gen_kwargs(asked, DEFAULT_NEW_TOKENS))
        self.stops: list[str] = [stop for stop in options.pop("until") if stop]
        self.max_new_tokens: int = options.pop("max_gen_toks")
        self.sampling = {name: options.pop(name) for name in SAMPLING_OPTIONS if name in options}
        unknown = {name: value for name, value in options.items() if CHANGES_NOTHING.get(name) != value}
        if unknown:
            raise InputError(f"task {task}: generation with {unknown} is not supported")
        if not 0 < self.max_new_tokens < context:
            raise InputError(
                f"task {task}: generates {self.max_new_tokens} tokens, the model's context is {context} with the prompt"
            )


def _grouped(keys: Iterable[Key]) -> dict[Key, list[int]]:
    """Return the places of each key."""
    groups: dict[Key, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return groups
