"""Fixed-length samples in a deterministic, resumable order.

Sample i of a split is tokens [i T, i T + T] of its stream: T inputs, and the same shifted by one as labels. Which
samples a microbatch gets follows from (seed, step, microbatch) alone: not from ranks, plan or where a run resumed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skippipe.data.token_cache import TokenCache
from skippipe.data.token_cache_index import SPLITS, Split
from skippipe.errors import CheckpointError, DataError

Batch = tuple[Tensor, Tensor]

VALIDATION_STREAM = 2**31
"""Stands where training has its epoch in the seed, beyond any epoch."""


@dataclass(frozen=True)
class UnreadTokens:
    """Tokens that other processes read; this one reads its own text once it begins microbatches itself."""

    fingerprint: str
    num_tokens: dict[Split, int]
    read: Callable[[], TokenCache]

    def checked(self) -> TokenCache:
        """Read the text; raise `DataError` where it has other tokens."""
        cache = self.read()
        if cache.fingerprint != self.fingerprint:
            raise DataError(
                f"data: this process has other tokens ({cache.fingerprint}) than the others ({self.fingerprint}); give "
                "every host that begins microbatches the same corpus"
            )
        return cache


class SampleOrder:
    """Order of the samples of a token cache: a seeded permutation for every epoch."""

    def __init__(self, tokens: TokenCache | UnreadTokens, *, seed: int, sequence_length: int) -> None:
        self._tokens, self.seed, self.sequence_length = tokens, seed, sequence_length
        self.fingerprint = tokens.fingerprint
        self.num_tokens = num_tokens(tokens) if isinstance(tokens, TokenCache) else tokens.num_tokens
        self.num_samples = {name: (self.num_tokens[name] - 1) // sequence_length for name in SPLITS}
        for name, count in self.num_samples.items():
            if count < 1:
                raise DataError(
                    f"data: the {name} split has {self.num_tokens[name]} tokens, a sample needs "
                    f"{sequence_length + 1}; give more text or a shorter training.sequence_length"
                )
        # Spread over the documents, so that a few batches already stand for the whole split.
        self._validation = np.random.default_rng([seed, VALIDATION_STREAM]).permutation(self.num_samples["validation"])
        self._permutation: tuple[int, np.ndarray[Any, Any]] = (-1, np.empty(0, dtype=np.int64))

    @property
    def is_read(self) -> bool:
        """Whether this process has read the tokens."""
        return isinstance(self._tokens, TokenCache)

    @property
    def cache(self) -> TokenCache:
        """The tokens, which are read now if they were not before; raises as `open_cache` does."""
        if isinstance(self._tokens, UnreadTokens):
            self._tokens = self._tokens.checked()
        return self._tokens

    def batch(self, step: int, microbatch: int, num_microbatches: int, micro_batch_size: int) -> Batch:
        """Return (input_ids, labels), both (B, T) int64, of one training microbatch; steps count from 0."""
        first = (step * num_microbatches + microbatch) * micro_batch_size
        return self._gather("train", [self._train_sample(first + offset) for offset in range(micro_batch_size)])

    def validation_batch(self, index: int, micro_batch_size: int) -> Batch:
        """Return batch `index` of the validation split, in a fixed mixed order; it wraps around at the end."""
        first = index * micro_batch_size
        count = self.num_samples["validation"]
        samples = [int(self._validation[(first + offset) % count]) for offset in range(micro_batch_size)]
        return self._gather("validation", samples)

    def cursor(self, step: int, num_microbatches: int, micro_batch_size: int) -> dict[str, Any]:
        """Return the position after `step` iterations, to be stored in a checkpoint."""
        seen = step * num_microbatches * micro_batch_size
        return {
            "tokens": self.fingerprint,
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "samples_per_iteration": num_microbatches * micro_batch_size,
            "samples_seen": seen,
            "epoch": seen // self.num_samples["train"],
        }

    def check_cursor(self, stored: dict[str, Any], step: int, num_microbatches: int, micro_batch_size: int) -> None:
        """Raise `CheckpointError` where the next batch would not be the one after a checkpoint's `stored` cursor."""
        for key, expected in self.cursor(step, num_microbatches, micro_batch_size).items():
            if stored.get(key) != expected:
                raise CheckpointError(
                    f"the checkpoint's data order has {key} {stored.get(key)!r}, this run {expected!r}; continue with "
                    "the same data, seed, sequence length and batch sizes, or start a new run"
                )

    def _train_sample(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_samples["train"])
        if self._permutation[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self._permutation = (epoch, generator.permutation(self.num_samples["train"]))
        return int(self._permutation[1][offset])

    def _gather(self, split: Split, samples: list[int]) -> Batch:
        length = self.sequence_length
        tokens = self.cache.split(split)
        rows = [tokens[sample * length : (sample + 1) * length + 1].astype(np.int64) for sample in samples]
        windows = torch.from_numpy(np.stack(rows))  # (B, T + 1)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def num_tokens(cache: TokenCache) -> dict[Split, int]:
    """Return how many tokens each split has."""
    return {name: len(cache.split(name)) for name in SPLITS}
