"""Text for a loaded model: samples to measure on, prompts, and what comes out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TextStreamer

from skippipe.checkpoint.huggingface.source import WeightSource, load_tokenizer
from skippipe.config.data_options import DataOptions
from skippipe.config.experiment import Experiment
from skippipe.data.samples import Batch, SampleOrder
from skippipe.data.sources import documents
from skippipe.data.token_cache import open_cache
from skippipe.data.tokenizer import Tokenizer, build_tokenizer, is_trained
from skippipe.errors import DataError
from skippipe.inference.model_loading import LoadedModel

CALIBRATION_SAMPLES = 4


class TextSource:
    """The tokenizer of a model and samples of fixed length from its own text or from given files."""

    def __init__(self, model: LoadedModel, *, sequence_length: int | None = None) -> None:
        self._experiment = model.experiment
        self.sequence_length = sequence_length or model.experiment.training.sequence_length
        self.batch_size = model.experiment.training.micro_batch_size

    @cached_property
    def order(self) -> SampleOrder:
        """Samples of the model's own text."""
        cache = open_cache(self._experiment.data, self._experiment.seed)
        return SampleOrder(cache, seed=self._experiment.seed, sequence_length=self.sequence_length)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the samples are made with."""
        return _tokenizer_of(self._experiment)

    def validation_batches(self, count: int, files: Sequence[Path] = ()) -> list[Batch]:
        """Return at most `count` batches, (B, T) inputs and labels: of held-out text, or of `files`."""
        if not files:
            return [self.order.validation_batch(index, self.batch_size) for index in range(count)]
        samples = self._samples(files)  # (N, T + 1)
        whole = max(len(samples) // self.batch_size, 1)
        firsts = range(0, min(whole, count) * self.batch_size, self.batch_size)
        batches = [samples[first : first + self.batch_size] for first in firsts]
        return [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in batches]

    def calibration_tokens(self, files: Sequence[Path] = ()) -> Tensor:
        """Return samples to measure on, (B, T + 1), of the text that the model is trained on, or of `files`."""
        if files:
            return self._samples(files)[:CALIBRATION_SAMPLES]
        input_ids, labels = self.order.batch(0, 0, 1, CALIBRATION_SAMPLES)
        return torch.cat([input_ids, labels[:, -1:]], dim=1)

    def _samples(self, files: Sequence[Path]) -> Tensor:
        options = DataOptions(source="text", paths=tuple(map(str, files)))
        parts = [np.append(self.tokenizer.encode(text), self.tokenizer.eos_id) for text in documents(options)]
        tokens = torch.from_numpy(np.concatenate([*parts, np.empty(0)]).astype(np.int64))
        length = self.sequence_length
        count = (len(tokens) - 1) // length
        if count < 1:
            raise DataError(
                f"{', '.join(map(str, files))}: {len(tokens)} tokens, a sample needs {length + 1}; "
                "give more text or a shorter --sequence-length"
            )
        return tokens[: count * length + 1].unfold(0, length + 1, length)  # (N, T + 1)


class PromptTokenizer:
    """Text to token ids and back as the model expects it in generation."""

    def __init__(self, model: LoadedModel) -> None:
        """A tokenizer of Hugging Face adds the special tokens that its files ask for; one made here has none."""
        options = model.experiment.data
        self._library: Any = None
        if options.tokenizer == "bytes" or is_trained(options):
            self._own: Tokenizer = _tokenizer_of(model.experiment)
        else:
            self._library = load_tokenizer(WeightSource(Path(options.tokenizer)))
        self.eos_id: int | None = self._library.eos_token_id if self._library else self._own.eos_id
        self.bos_id: int | None = self._library.bos_token_id if self._library else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a prompt."""
        if self._library is not None:
            ids: list[int] = self._library(text, add_special_tokens=add_special_tokens)["input_ids"]
            return ids
        return [int(token) for token in self._own.encode(text)]

    def decode(self, tokens: Iterable[int] | int, **_: Any) -> str:
        """Return the text of token ids, special tokens left out."""
        ids = [tokens] if isinstance(tokens, int) else list(tokens)
        if self._library is not None:
            text: str = self._library.decode(ids, skip_special_tokens=True)
            return text
        return self._own.decode(ids)


def _tokenizer_of(experiment: Experiment) -> Tokenizer:
    """Return the tokenizer of an experiment; only one that is trained on the corpus needs it at hand."""
    if is_trained(experiment.data):
        return open_cache(experiment.data, experiment.seed).tokenizer
    return build_tokenizer(experiment.data, iter(()))


@contextmanager
def streaming(tokenizer: PromptTokenizer, prompt: Sequence[int] | None) -> Iterator[Callable[[Tensor], None] | None]:
    """Print a prompt and what follows it to standard output, as it comes; nothing where `prompt` is None."""
    if prompt is None:
        yield None
        return
    streamer = TextStreamer(tokenizer)
    streamer.put(torch.tensor(prompt))
    yield lambda tokens: streamer.put(tokens.cpu())
    streamer.end()
