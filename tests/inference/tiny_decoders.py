"""Tiny decoders of several architectures with random weights."""

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from tiny_models import hugging_face, tiny

from skippipe.inference.decoder import Bounds, Decoder
from skippipe.model.skeleton import find_parts

ARCHITECTURES = ("llama", "gpt2", "gemma2")

__all__ = ["ARCHITECTURES", "decoder_of", "hugging_face", "model_of", "tiny"]


def decoder_of(config: PretrainedConfig, stages: Sequence[Bounds] = ()) -> Decoder:
    return Decoder(find_parts(hugging_face(config)), stages)


@cache
def model_of(architecture: str) -> PreTrainedModel:
    """Return a model of 6 layers whose weights are large enough for different tokens to come out."""
    options: dict[str, object] = {"num_hidden_layers": 6, "initializer_range": 0.2}
    if architecture == "gemma2":
        options["layer_types"] = ["sliding_attention", "full_attention"] * 3
    return hugging_face(tiny(architecture, **options))
