"""How the next token is chosen: Hugging Face's options and code of sampling."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from skippipe.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; names, order and meaning as in `transformers`.

    Examples:
        >>> Sampling().changes_scores, Sampling(repetition_penalty=1.2).changes_scores
        (False, True)
        >>> drawn = Sampling(do_sample=True, temperature=0.8, top_p=0.9, seed=1)
        >>> len(generate_texts(model, ["import "], TextOptions(sampling=drawn, max_new_tokens=3)).result.tokens[0])
        3
    """

    do_sample: bool = False
    """Whether to draw the token; else the likeliest one is taken, and only the repetition penalty has an effect."""
    temperature: float = 1.0
    """What the logits are divided by; above 0."""
    top_k: int = 50
    """Draw from so many of the likeliest tokens; from all where it is 0."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that have this probability together; from all where it is 1."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that the text has already become less likely."""
    seed: int = 0
    """Seed of the draws."""

    @property
    def changes_scores(self) -> bool:
        """Whether anything but the likeliest token of the model itself can be chosen."""
        return self.do_sample or self.repetition_penalty != 1.0

    def processors(self) -> LogitsProcessorList:
        """Return what turns logits into scores; raise `InputError` for values that make no sense."""
        if not 0 < self.top_p <= 1:
            raise InputError(f"sampling: top_p is {self.top_p:g}; it is a probability, above 0 and up to 1")
        chosen = LogitsProcessorList()
        try:
            if self.repetition_penalty != 1.0:
                chosen.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
            if self.do_sample and self.temperature != 1.0:
                chosen.append(TemperatureLogitsWarper(self.temperature))
            if self.do_sample and self.top_k != 0:
                chosen.append(TopKLogitsWarper(self.top_k))
            if self.do_sample and self.top_p < 1.0:
                chosen.append(TopPLogitsWarper(self.top_p))
        except ValueError as reason:
            raise InputError(f"sampling: {' '.join(str(reason).split())}") from None
        return chosen


class TokenChoice:
    """The choice of next tokens in a batch; its draws follow from one seed. B rows, T columns, V vocabulary."""

    def __init__(self, sampling: Sampling, lengths: Sequence[int], device: torch.device) -> None:
        """`lengths` are those of the prompts, which are padded on the left."""
        self.draws = sampling.do_sample
        self._processors = sampling.processors()
        self._padding = [max(lengths) - length for length in lengths]
        self.generator = torch.Generator(device).manual_seed(sampling.seed) if sampling.do_sample else None
        """Of the draws; None where nothing is drawn."""

    def choose(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Return the next token of each row, (B,), after the texts `ids`, (B, T), from its logits, (B, V)."""
        scores = self._scores(ids, logits)
        return self._drawn(scores.softmax(dim=-1)) if self.draws else scores.argmax(dim=-1)

    def draft(self, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens as `choose` does, (B,), and what they are chosen from: how likely each token is, (B, V)."""
        probabilities = self._scores(ids, logits).softmax(dim=-1)
        return self._drawn(probabilities) if self.draws else probabilities.argmax(dim=-1), probabilities

    def check(self, ids: Tensor, logits: Tensor, drafted: Tensor, chances: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the next token of each row, (B,), and for which rows the drafted one stays, (B,).

        Tokens are distributed as those of `choose`, whatever was drafted (Leviathan et al. 2023, arXiv 2211.17192): a
        draft stays as often as the model finds it likelier than the draft did; where it goes, the token is drawn from
        what the model finds likelier.

        Args:
            ids: The texts before the token, (B, T).
            logits: What the model says of it, (B, V).
            drafted: The tokens that were drafted, (B,).
            chances: How likely each token was to be drafted, (B, V); None where nothing was drawn.
        """
        if not self.draws:
            tokens = self.choose(ids, logits)
            return tokens, tokens == drafted
        own, at = self._scores(ids, logits).softmax(dim=-1), drafted.unsqueeze(1)
        if chances is None:
            chances = torch.zeros_like(own).scatter_(1, at, 1.0)
        luck = torch.rand(at.shape, generator=self.generator, device=own.device)
        stays = luck * chances.gather(1, at) < own.gather(1, at)  # (B, 1)
        others = torch.where(stays, own, (own - chances).clamp(min=0))
        return torch.where(stays.squeeze(1), drafted, self._drawn(others)), stays.squeeze(1)

    def _drawn(self, weights: Tensor) -> Tensor:
        return torch.multinomial(weights, 1, generator=self.generator).squeeze(1)

    def _scores(self, ids: Tensor, logits: Tensor) -> Tensor:
        scores: Tensor = logits.float()
        if self._processors:
            scores = torch.cat([self._processors(own, row) for own, row in self._rows(ids, scores)])
        return scores

    def _rows(self, ids: Tensor, scores: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the text so far without padding, (b, T), and scores, (b, V), of rows with texts of one length."""
        if not any(self._padding):
            yield ids, scores
            return
        for row, padding in enumerate(self._padding):
            yield ids[row : row + 1, padding:], scores[row : row + 1]
