"""A random model that stands in for a pretrained one where only the way is tried."""

from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from skippipe.config.data_options import DataOptions
from skippipe.data.tokenizer import ByteTokenizer, save_for_transformers


def write_tiny_model(folder: Path, num_layers: int) -> Path:
    """Write a random model of so many layers, over bytes, as a Hugging Face directory; return where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=ByteTokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_for_transformers(DataOptions(source="python_stdlib"), ByteTokenizer(), folder)
    return folder
