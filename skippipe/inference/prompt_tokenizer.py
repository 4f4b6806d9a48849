"""Text to tokens and back as a loaded model expects it in generation, and text on the terminal as it comes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer
from transformers.utils import GENERATION_CONFIG_NAME

from skippipe.checkpoint.huggingface.source import WeightSource, load_tokenizer
from skippipe.data.kept_tokenizer import kept_options
from skippipe.data.rows import check_unicode
from skippipe.data.tokenizer import Tokenizer, is_trained
from skippipe.errors import InputError
from skippipe.inference.model_loading import LoadedModel
from skippipe.inference.text_source import own_tokenizer
from skippipe_scheduler.files import read_json


class PromptTokenizer:
    """Text to token ids and back as the model expects it in generation."""

    def __init__(self, model: LoadedModel) -> None:
        """A tokenizer of Hugging Face adds the special tokens that its files ask for; one made here has none."""
        options = model.experiment.data
        self._library: Any = None
        if options.tokenizer == "bytes" or is_trained(options):
            self._own: Tokenizer = own_tokenizer(model)
        else:
            self._library = load_tokenizer(WeightSource(Path(kept_options(options, model.run_dir).tokenizer)))
        self.eos_id: int | None = self._library.eos_token_id if self._library else self._own.eos_id
        self.end_ids = frozenset((*_ends_of(model), *(() if self.eos_id is None else (self.eos_id,))))
        """Every token that ends a text: those that the model's files name, and the tokenizer's own."""
        self.bos_id: int | None = self._library.bos_token_id if self._library else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a prompt; raise `DataError` for one that has no UTF-8."""
        check_unicode(text, "prompt")
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

    def continuation(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """Return what tokens add to the text of the prompt before them.

        Decoded alone, the first may read otherwise: Llama's first tokenizers leave out the space that begins a text.
        """
        whole = self.decode([*prompt, *tokens])
        return whole[len(self.decode(prompt)) :]


def _ends_of(model: LoadedModel) -> tuple[int, ...]:
    """Return `eos_token_id` of generation_config.json, as generation in transformers does, or else of config.json."""
    directory = model.experiment.model.directory
    path = Path(directory or "") / GENERATION_CONFIG_NAME
    named: Any = read_json(path, InputError).get("eos_token_id") if directory and path.is_file() else None
    if named is None:
        named = model.decoder.config.eos_token_id
    ends = tuple(named) if isinstance(named, list) else () if named is None else (named,)
    if any(type(end) is not int for end in ends):
        raise InputError(f"{path}: eos_token_id is {named!r}; give a token id, or a list of them")
    return ends


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
