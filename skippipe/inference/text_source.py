"""Text to measure a loaded model on: samples of fixed length, of its own text or of files."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skippipe.checkpoint.reader import checkpoints_folder, read_metadata
from skippipe.config.data_options import DataOptions
from skippipe.data.building.tokenising import check_ids
from skippipe.data.kept_tokenizer import kept_tokenizer, tokenizer_of_run
from skippipe.data.samples import Batch, SampleOrder
from skippipe.data.sources import Document, documents
from skippipe.data.token_cache import open_cache
from skippipe.data.tokenizer import Tokenizer, document_tokens
from skippipe.errors import DataError
from skippipe.inference.model_loading import LoadedModel
from skippipe.model.architecture import check_length

CALIBRATION_SAMPLES = 4


class TextSource:
    """The tokenizer of a model and samples of fixed length from its own text or from given files."""

    def __init__(self, model: LoadedModel, *, sequence_length: int | None = None) -> None:
        self._model, self._experiment = model, model.experiment
        trained_on = model.experiment.training.sequence_length
        self.sequence_length = sequence_length or min(trained_on, model.decoder.context)
        check_length(model.decoder.config, self.sequence_length, "--sequence-length")
        self._vocabulary = model.decoder.vocabulary
        self.batch_size = model.experiment.training.micro_batch_size

    @cached_property
    def order(self) -> SampleOrder:
        """Samples of the model's own text."""
        options, seed = self._experiment.data, self._experiment.seed
        cache = open_cache(options, seed, self._vocabulary, kept_tokenizer(options, self._model.run_dir))
        return SampleOrder(cache, seed=self._experiment.seed, sequence_length=self.sequence_length)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the samples are made with."""
        return own_tokenizer(self._model)

    def validation_batches(self, count: int, files: Sequence[Path] = ()) -> list[Batch]:
        """Return at most `count` batches, (B, T) inputs and labels: of held-out text, or of `files`.

        No sample is in two of them. All are of one size, so the last samples may be left out; it is smaller than
        `batch_size` only where there are no more samples.
        """
        samples = self._samples(files) if files else None  # (N, T + 1)
        available = self.order.num_samples["validation"] if samples is None else len(samples)
        size = min(self.batch_size, available)
        indices = range(min(available // size, count))
        if samples is None:
            return [self.order.validation_batch(index, size) for index in indices]
        batches = [samples[index * size : (index + 1) * size] for index in indices]
        return [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in batches]

    def calibration_tokens(self, files: Sequence[Path] = ()) -> Tensor:
        """Return samples to measure on, (B, T + 1), of the text that the model is trained on, or of `files`."""
        if files:
            return self._samples(files)[:CALIBRATION_SAMPLES]
        input_ids, labels = self.order.batch(0, 0, 1, CALIBRATION_SAMPLES)
        return torch.cat([input_ids, labels[:, -1:]], dim=1)

    def _samples(self, files: Sequence[Path]) -> Tensor:
        options = DataOptions(source="text", paths=tuple(map(str, files)))
        parts = [part for document in documents(options) for part in self._document(document)]
        tokens = torch.from_numpy(np.concatenate([*parts, np.empty(0)]).astype(np.int64))
        length = self.sequence_length
        count = (len(tokens) - 1) // length
        if count < 1:
            raise DataError(
                f"{', '.join(map(str, files))}: {len(tokens)} tokens, a sample needs {length + 1}; "
                "give more text or a shorter --sequence-length"
            )
        return tokens[: count * length + 1].unfold(0, length + 1, length)  # (N, T + 1)

    def _document(self, document: Document) -> Iterator[NDArray[Any]]:
        """Yield the tokens of a document that has text."""
        if document.measure()[0]:
            for tokens in document_tokens(self.tokenizer, document.pieces()):
                check_ids(tokens, self.tokenizer, self._vocabulary, document.place)
                yield tokens


def own_tokenizer(model: LoadedModel) -> Tokenizer:
    """Return the tokenizer of a model; only a run of a version before 0.3 may need the corpus for it."""
    fingerprint = None
    if model.run_dir is not None:
        fingerprint = read_metadata(checkpoints_folder(model.run_dir) / model.checkpoint).data.get("tokens")
    return tokenizer_of_run(model.experiment.data, model.experiment.seed, model.run_dir, fingerprint)
