"""Text from a model of which a part runs: a KV cache, batches of prompts of any lengths, Hugging Face's sampling."""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from skippipe.errors import InputError, NodeLostError
from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import Flop, LayerSelection, Segment, check_shrinks, segments
from skippipe.inference.generation.flop_counter import FlopCounter
from skippipe.inference.generation.sampling import Sampling, TokenChoice
from skippipe.inference.key_value_cache import RouteCache
from skippipe.inference.policies.base import FlopMeter, Policy
from skippipe.inference.task_progress import TaskProgress

logger = logging.getLogger(__name__)

OnTokens = Callable[[Tensor], None]
"""Called with the newest token of each row, (B,)."""
EndOfText = int | Collection[int] | None
"""Token or tokens that end a text; None where no token does."""
IsEnd = Callable[[Sequence[int]], bool]
"""Whether the new tokens of a row are a whole answer."""


@dataclass
class Prompts:
    """Prompts of different lengths as one batch: padding on the left, so that all rows end together."""

    ids: Tensor
    """(B, P), 0 where padded."""
    position_ids: Tensor
    """(B, P + what comes): positions in each row's own text; 0 where padded."""
    mask: Tensor | None
    """(B, P + what comes): 0 for padding; None where all have one length."""
    lengths: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], max_new_tokens: int, device: torch.device) -> "Prompts":
        """Pad the prompts."""
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        padding = longest - torch.tensor(lengths, device=device).unsqueeze(1)  # (B, 1)
        columns = torch.arange(longest + max_new_tokens, device=device)
        position_ids = (columns - padding).clamp(min=0)
        mask = (columns >= padding).long() if min(lengths) < longest else None
        return cls(ids, position_ids, mask, lengths)


@dataclass(frozen=True)
class Generated:
    """New tokens of each prompt, and how much of the model made them.

    Examples:
        >>> generated = generate(model.decoder, FixedLayers((0, 1, 2)), [[72, 105]], max_new_tokens=4)
        >>> generated.summary
        "share of the layers' compute: 50.0% for the prompt, 50.0% after it"
    """

    tokens: list[list[int]]
    """New token ids by prompt, up to and with the end of text."""
    share_of_prompt: float
    """Share of the layers' FLOP that was computed for the prompts."""
    share_of_generated: float
    """The same for the tokens after them; that of the prompts where no token passed the model again."""
    flop: Flop = field(default_factory=Flop)
    """Of both together."""

    @property
    def summary(self) -> str:
        """The shares in words."""
        return (
            f"share of the layers' compute: {self.share_of_prompt:.1%} for the prompt, "
            f"{self.share_of_generated:.1%} after it"
        )


def check_prompts(decoder: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise `InputError` for an empty prompt or a token that the model does not know, and where it does not fit.

    Prompt and answer together must fit into the model's context.
    """
    if not prompts:
        raise InputError("prompts: there are none; give at least one")
    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {max_new_tokens}: give at least 1")
    vocabulary = decoder.vocabulary
    for index, prompt in enumerate(prompts):
        room = decoder.context - len(prompt)
        if not prompt:
            raise InputError(f"prompt {index}: it is empty; give at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            unknown = next(token for token in prompt if not 0 <= token < vocabulary)
            raise InputError(
                f"prompt {index}: token {unknown}, the model's vocabulary has {vocabulary}; take the model's tokenizer"
            )
        if room < 1:
            raise InputError(
                f"prompt {index}: {len(prompt)} tokens, the model's context is {decoder.context}; shorten it"
            )
        if max_new_tokens > room:
            raise InputError(
                f"--max-new-tokens {max_new_tokens}: after prompt {index} of {len(prompt)} tokens, the model's "
                f"context of {decoder.context} has room for {room}"
            )


def positions_after_prompt(max_new_tokens: int) -> int:
    """Return over how many positions an answer spreads its depth: all new tokens but the last, which no layer reads."""
    return max(1, max_new_tokens - 1)


@torch.inference_mode()
def generate(
    decoder: Decoder,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    eos_id: EndOfText = None,
    on_tokens: OnTokens | None = None,
    is_end: IsEnd | None = None,
    progress: TaskProgress | None = None,
) -> Generated:
    """Continue prompts that are given as token ids, as one batch. `generate_texts` takes text.

    Args:
        decoder: The model.
        policy: Which layers run at which position.
        prompts: Token ids of each prompt; lengths may differ.
        max_new_tokens: The most new tokens of each prompt.
        sampling: How the next token is chosen; the likeliest one where not given.
        eos_id: Token that ends a text, or several of which any does; it ends when all rows have met their end. None: no
            token does.
        on_tokens: Called with the newest token of each row, (B,), as they come.
        is_end: Whether the new tokens of a row are a whole answer. What a row says after that is left in.
        progress: The tokens that are there already, and who hears of further ones. None: none, and nobody.

    Returns:
        The new tokens, and how much of the model made them.

    Raises:
        InputError: A prompt is empty, prompt and answer do not fit into the model's context, or a value of `sampling`
            is refused.

    Examples:
        >>> generated = generate(model.decoder, FixedLayers((0, 1, 4, 5)), [[72, 105], [33]], max_new_tokens=4)
        >>> [len(tokens) for tokens in generated.tokens]
        [4, 4]
        >>> round(generated.share_of_generated, 2)
        0.67
    """
    check_prompts(decoder, prompts, max_new_tokens)
    batch = Prompts.of(prompts, max_new_tokens, decoder.device)
    with policy.installed(decoder) as meter:
        loop = _Loop(decoder, policy, batch, max_new_tokens, sampling or Sampling(), meter, progress or TaskProgress())
        ends = end_tokens(eos_id)
        loop.run(ends, on_tokens, is_end)
        prompt, answer = loop.tally.prompt, loop.tally.answer
    share_of_answer = answer.share if answer.whole else prompt.share
    tokens = [up_to_end(row, ends) for row in loop.answers()]
    return Generated(tokens, prompt.share, share_of_answer, prompt + answer)


class _Loop:
    """One batch on its way: `ids` (B, P + N) holds prompts and, up to `length`, what was generated."""

    def __init__(
        self,
        decoder: Decoder,
        policy: Policy,
        batch: Prompts,
        max_new_tokens: int,
        sampling: Sampling,
        meter: FlopMeter | None,
        progress: TaskProgress,
    ) -> None:
        self._progress = progress
        self._decoder, self._policy, self._batch, self._meter = decoder, policy, batch, meter
        self._prompt_length = self.length = batch.ids.shape[1]
        self._end = self.length + max_new_tokens
        self.ids = torch.cat([batch.ids, batch.ids.new_zeros(len(batch.ids), max_new_tokens)], dim=1)
        self._cache = RouteCache(decoder.num_layers, self._end)
        self._choice = TokenChoice(sampling, batch.lengths, decoder.device)
        self.tally = FlopCounter(decoder.num_layers, decoder.cost, batch.lengths, meter)

    def answers(self) -> list[list[int]]:
        """Return the new tokens of each row so far."""
        rows: list[list[int]] = self.ids[:, self._prompt_length : self.length].tolist()
        return rows

    def run(self, ends: frozenset[int], on_tokens: OnTokens | None, is_end: IsEnd | None) -> None:
        """Generate until all rows have ended or there is no room left."""
        end_ids = torch.tensor(sorted(ends), device=self.ids.device, dtype=torch.long)
        ended = torch.zeros(len(self.ids), dtype=torch.bool, device=self.ids.device)
        while True:
            if self._progress.knows_next:
                self._count()
            tokens = self.ids.new_tensor(self._progress.step(self._next_tokens, self._choice.generator))  # (B,)
            self.ids[:, self.length] = tokens
            self.length += 1
            if on_tokens is not None:
                on_tokens(tokens)
            if ends:
                ended |= torch.isin(tokens, end_ids)
            if is_end is not None:
                ended |= torch.tensor([is_end(row) for row in self.answers()], device=ended.device)
            may_end = bool(ends) or is_end is not None
            if self.length == self._end or (may_end and bool(ended.all())):
                return

    def _next_tokens(self) -> list[int]:
        tokens: list[int] = self._choice.choose(self.ids[:, : self.length], self._logits()[:, -1]).tolist()
        return tokens

    def _logits(self) -> Tensor:
        """Return the logits after the newest token, (B, 1, V).

        The text is read again where a node is lost, by the others, and where the model rotates keys otherwise from this
        length on.
        """
        if self._decoder.must_read_again(self._cache.seen, self.length):
            self._cache = RouteCache(self._decoder.num_layers, self._end)
        while True:
            try:
                return self._step() if self._cache.seen else self._read()
            except NodeLostError:
                logger.warning("the text so far is read again, by those that are left")
            self._cache = RouteCache(self._decoder.num_layers, self._end)

    def _read(self) -> Tensor:
        """Run everything that is there: the prompts, before any answer."""
        layers_of = [self._layers_at(column) for column in range(self.length)]
        position_ids, mask = self._batch.position_ids[:, : self.length], self._batch.mask
        if self._meter is not None:
            self._meter.begin(position_ids, mask)
        logits = self._decoder.logits(
            self.ids[:, : self.length],
            segments(layers_of),
            position_ids=position_ids,
            attention_mask=mask,
            cache=self._cache,
            num_last=1,
        )
        self._count()
        return logits

    def _step(self) -> Tensor:
        """Run the newest token of each row."""
        layers = self._layers_at(self.length - 1)
        check_shrinks(self._layers_at(self.length - 2), layers)
        newest = slice(self.length - 1, self.length)
        position_ids = self._batch.position_ids[:, newest]  # (B, 1)
        if self._meter is not None:
            self._meter.begin(position_ids)
        logits = self._decoder.logits(
            self.ids[:, newest],
            (Segment(layers, 1),),
            position_ids=position_ids,
            attention_mask=self._batch.mask,
            cache=self._cache,
        )
        self._count()
        return logits

    def _count(self) -> None:
        """Count what the next token takes: the prompts, or the newest token of each row."""
        if self.length == self._prompt_length:
            self.tally.count_prompt([self._layers_at(column) for column in range(self.length)])
        else:
            self.tally.count_step(self._layers_at(self.length - 1))

    def _layers_at(self, column: int) -> LayerSelection:
        return self._policy.layers_at(column, self._prompt_length)


def end_tokens(eos_id: EndOfText) -> frozenset[int]:
    """Return the tokens that end a text."""
    if eos_id is None:
        return frozenset()
    return frozenset((eos_id,) if isinstance(eos_id, int) else eos_id)


def up_to_end(row: list[int], ends: Collection[int]) -> list[int]:
    """Return tokens up to and with the first that ends the text."""
    return next((row[: index + 1] for index, token in enumerate(row) if token in ends), row)
