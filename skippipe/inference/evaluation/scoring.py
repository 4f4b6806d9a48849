"""Log-likelihoods of given texts under a policy, many at a time."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import Flop, flop_of, segments
from skippipe.inference.policies.base import Policy

MOST_LOGITS = 2**27
"""Logits of one batch at most, half a GiB in fp32."""


@dataclass(frozen=True)
class Passage:
    """A text whose continuation is measured, given its context; at least one token each."""

    context: Sequence[int]
    continuation: Sequence[int]
    prompt_length: int
    """Positions at the start that count as a prompt; policies may run them in full."""

    @property
    def inputs(self) -> list[int]:
        """What the model reads: all but the last token."""
        return [*self.context, *self.continuation][:-1]

    @property
    def length(self) -> int:
        """Positions that the model reads."""
        return len(self.context) + len(self.continuation) - 1

    @property
    def num_after_prompt(self) -> int:
        """Positions that the model reads after the prompt."""
        return self.length - self.prompt_length


@dataclass(frozen=True)
class Score:
    """How likely a continuation is."""

    log_likelihood: float
    """Sum over its tokens, natural logarithm."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest one."""


def batches(decoder: Decoder, passages: Sequence[Passage], batch_size: int) -> Iterator[list[int]]:
    """Yield the numbers of the passages to score together: the longest first, of similar length, as memory allows."""
    order = sorted(range(len(passages)), key=lambda number: passages[number].length, reverse=True)
    batch: list[int] = []
    for number in order:
        grown = [passages[member] for member in (*batch, number)]
        logits = len(grown) * _num_columns(grown) * decoder.config.vocab_size
        if batch and (len(grown) > batch_size or logits > MOST_LOGITS):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


@torch.inference_mode()
def score(decoder: Decoder, policy: Policy, passages: Sequence[Passage]) -> tuple[list[Score], Flop]:
    """Score passages as one batch; return the FLOP of their layers too.

    Rows are shifted so that their prompts end together. B rows, T positions, of which the last N are measured.
    """
    batch = _Batch(passages, decoder.device)
    layers_of = [policy.layers_at(column, batch.prompt_length) for column in range(batch.length)]
    with policy.installed(decoder) as meter:
        if meter is not None:
            meter.begin(batch.position_ids, batch.mask)
        logits = decoder.logits(
            batch.ids,
            segments(layers_of),
            position_ids=batch.position_ids,
            attention_mask=batch.mask,
            num_last=_num_columns(passages),
        )  # (B, N, V)
    before = batch.length - logits.shape[1]
    scores = [
        _score(row[first - before : last - before], passage)
        for row, (first, last), passage in zip(logits, batch.measured(), passages, strict=True)
    ]
    flop = Flop(0.0, -meter.skipped_flop if meter is not None else 0.0)
    for shift, length in zip(batch.shifts, batch.lengths, strict=True):
        flop += flop_of(layers_of[shift : shift + length], decoder.num_layers, decoder.cost)
    return scores, flop


class _Batch:
    """Passages as one batch, padded on both sides."""

    def __init__(self, passages: Sequence[Passage], device: torch.device) -> None:
        self._passages = passages
        self.prompt_length = max(passage.prompt_length for passage in passages)
        self.shifts = [self.prompt_length - passage.prompt_length for passage in passages]
        self.lengths = [passage.length for passage in passages]
        rows = ([0] * shift + passage.inputs for shift, passage in zip(self.shifts, passages, strict=True))
        self.ids = _padded(rows, device)
        self.length = self.ids.shape[1]
        shift, length = (torch.tensor(counts, device=device).unsqueeze(1) for counts in (self.shifts, self.lengths))
        columns = torch.arange(self.length, device=device)
        self.position_ids = torch.minimum((columns - shift).clamp(min=0), length - 1)  # (B, T)
        is_token = (columns >= shift) & (columns < shift + length)
        self.mask = None if bool(is_token.all()) else is_token.long()  # (B, T)

    def measured(self) -> Iterator[tuple[int, int]]:
        """Yield the columns [first, last) of each row that predict its continuation."""
        for shift, length, passage in zip(self.shifts, self.lengths, self._passages, strict=True):
            yield shift + length - len(passage.continuation), shift + length


def _num_columns(passages: Sequence[Passage]) -> int:
    """Return how many of the last columns have logits that are needed."""
    prompt = max(passage.prompt_length for passage in passages)
    length = prompt + max(passage.num_after_prompt for passage in passages)
    return length - min(prompt - passage.prompt_length + len(passage.context) - 1 for passage in passages)


def _score(logits: Tensor, passage: Passage) -> Score:
    """Return the score from the logits before each token of the continuation, (n, V)."""
    expected = torch.tensor(passage.continuation, device=logits.device)  # (n,)
    log_probabilities = logits.float().log_softmax(dim=-1)
    chosen = log_probabilities.gather(1, expected.unsqueeze(1))
    return Score(float(chosen.double().sum()), bool((logits.argmax(dim=-1) == expected).all()))


def _padded(rows: Iterable[Sequence[int]], device: torch.device) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
