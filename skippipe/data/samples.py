"""Fixed-length samples in a deterministic, resumable order.

Sample i of a split is tokens [i T, i T + T] of its stream: T inputs, and the same shifted by one as labels. Which
samples a microbatch gets follows from (seed, step, microbatch) alone: not from ranks, plan or where a run resumed.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skippipe.data.token_cache import TokenCache
from skippipe.data.token_cache_index import SPLITS, Split
from skippipe.errors import CheckpointError, DataError

Batch = tuple[Tensor, Tensor]

VALIDATION_STREAM = 2**31
"""Stands where training has its epoch in the seed, beyond any epoch."""


@dataclass(frozen=True)
class RunText:
    """The text of a run: what all hosts that begin microbatches have, or all that they have together."""

    fingerprint: str
    """Of its tokens."""
    num_tokens: dict[Split, int]
    of_nodes: dict[str, str] = field(default_factory=dict)
    """Fingerprint of what each node has, where each has its own."""

    def check(self, cache: TokenCache, node: str) -> None:
        """Raise `DataError` where a node has other tokens than it should; a node that is not known has its own."""
        expected = self.of_nodes.get(node) if self.of_nodes else self.fingerprint
        if expected not in (None, cache.fingerprint):
            whose = "it had before" if self.of_nodes else "the others"
            raise DataError(
                f"data: {node} has other tokens ({cache.fingerprint}) than {whose} ({expected}); give every host that "
                f"begins microbatches the {'text it had' if self.of_nodes else 'same corpus'}"
            )


class SampleOrder:
    """Order of the samples of a token cache: a seeded permutation for every epoch."""

    def __init__(
        self,
        tokens: TokenCache | Callable[[], TokenCache],
        *,
        seed: int,
        sequence_length: int,
        text: RunText | None = None,
    ) -> None:
        """Take the samples of `tokens`, which are the whole `text` of the run, or this host's own part of it.

        A host that begins no microbatches gives what reads them, for the time when it does.
        """
        if text is None:
            assert isinstance(tokens, TokenCache)
            text = text_of(tokens)
        self._tokens, self.seed, self.sequence_length, self.text = tokens, seed, sequence_length, text
        self._learn(num_tokens(tokens) if isinstance(tokens, TokenCache) else text.num_tokens)

    def _learn(self, tokens: dict[Split, int]) -> None:
        """Make the order of the samples of so many tokens."""
        self.num_samples = {name: (tokens[name] - 1) // self.sequence_length for name in SPLITS}
        for name, count in self.num_samples.items():
            if count < 1:
                raise DataError(
                    f"data: the {name} split has {tokens[name]} tokens, a sample needs {self.sequence_length + 1}; "
                    "give more text or a shorter training.sequence_length"
                )
        # Spread over the documents, so that a few batches already stand for the whole split.
        generator = np.random.default_rng([self.seed, VALIDATION_STREAM])
        self._validation = generator.permutation(self.num_samples["validation"])
        self._permutation: tuple[int, np.ndarray[Any, Any]] = (-1, np.empty(0, dtype=np.int64))

    @property
    def is_read(self) -> bool:
        """Whether this process has read the tokens."""
        return isinstance(self._tokens, TokenCache)

    @property
    def cache(self) -> TokenCache:
        """The tokens, which are read now if they were not before; raises as `open_cache` does."""
        if not isinstance(self._tokens, TokenCache):
            self._tokens = self._tokens()
            self._learn(num_tokens(self._tokens))
        return self._tokens

    def batch(self, step: int, microbatch: int, num_microbatches: int, micro_batch_size: int) -> Batch:
        """Return (input_ids, labels), both (B, T) int64, of one training microbatch; steps count from 0."""
        tokens = self.cache.split("train")  # read before the order is asked, which follows from how many there are
        first = (step * num_microbatches + microbatch) * micro_batch_size
        return self._gather(tokens, [self._train_sample(first + offset) for offset in range(micro_batch_size)])

    def validation_batch(self, index: int, micro_batch_size: int) -> Batch:
        """Return batch `index` of the validation split, in a fixed mixed order; it wraps around at the end."""
        tokens, first = self.cache.split("validation"), index * micro_batch_size
        count = self.num_samples["validation"]
        samples = [int(self._validation[(first + offset) % count]) for offset in range(micro_batch_size)]
        return self._gather(tokens, samples)

    def cursor(self, step: int, num_microbatches: int, micro_batch_size: int) -> dict[str, Any]:
        """Return the position after `step` iterations, to be stored in a checkpoint."""
        seen = step * num_microbatches * micro_batch_size
        return {
            "tokens": self.text.fingerprint,
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "samples_per_iteration": num_microbatches * micro_batch_size,
            "samples_seen": seen,
            "epoch": seen // max(1, (self.text.num_tokens["train"] - 1) // self.sequence_length),
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

    def _gather(self, tokens: NDArray[Any], samples: list[int]) -> Batch:
        length = self.sequence_length
        rows = [tokens[sample * length : (sample + 1) * length + 1].astype(np.int64) for sample in samples]
        windows = torch.from_numpy(np.stack(rows))  # (B, T + 1)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def text_of(cache: TokenCache) -> RunText:
    """Return the text of a run that has one cache."""
    return RunText(cache.fingerprint, num_tokens(cache))


def text_together(of_nodes: Mapping[str, RunText]) -> RunText:
    """Return the text of a run whose nodes have what is given, each its own; what several have counts once."""
    texts = {text.fingerprint: text for text in of_nodes.values()}
    digest = hashlib.sha256(" ".join(sorted(texts)).encode()).hexdigest()
    total: dict[Split, int] = {name: sum(text.num_tokens[name] for text in texts.values()) for name in SPLITS}
    return RunText(digest[:16], total, {node: text.fingerprint for node, text in of_nodes.items()})


def num_tokens(cache: TokenCache) -> dict[Split, int]:
    """Return how many tokens each split has."""
    return {name: len(cache.split(name)) for name in SPLITS}
