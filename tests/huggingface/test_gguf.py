"""A GGUF file, written with the format's own library, made into a run."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from skippipe.checkpoint.huggingface import source
from skippipe.checkpoint.huggingface.export import export_run
from skippipe.checkpoint.huggingface.import_model import import_model
from skippipe.data.tokenizer import END_OF_TEXT, byte_names
from skippipe.errors import InputError

SMALL = ("data.max_bytes=200_000", "pipeline.planner.max_evaluations=300", "pipeline.num_stages=3")
LAYERS, HEADS, HIDDEN, INNER, VOCABULARY = 3, 2, 64, 96, 257
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(2)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=HEADS, num_key_value_heads=HEADS))


def interleaved(weight: Tensor) -> Tensor:
    """Return rows of queries or keys (D, D) in the order in which the format keeps rotary pairs: neighbours."""
    halves = weight.reshape(HEADS, 2, HIDDEN // HEADS // 2, HIDDEN)
    return halves.transpose(1, 2).reshape(HIDDEN, HIDDEN)


def write_gguf(model: LlamaForCausalLM, path: Path, *, left_out: str = "", rope_factors: bool = False) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_vocab_size(VOCABULARY)
    names = sorted(byte_names(), key=byte_names().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*names, END_OF_TEXT])
    writer.add_token_types([1] * 256 + [3])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_merges([])
    writer.add_eos_token_id(256)
    writer.add_bos_token_id(256)
    ends = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    for name, tensor in model.state_dict().items():
        if name in ends:
            stored = ends[name]
        else:
            _, _, layer, part = name.removesuffix(".weight").split(".", maxsplit=3)
            stored = f"blk.{layer}.{NAMES[part]}"
            tensor = interleaved(tensor) if NAMES[part] in ("attn_q", "attn_k") else tensor
        if stored != left_out:
            writer.add_tensor(f"{stored}.weight", np.ascontiguousarray(tensor.numpy()))
    if rope_factors:
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, HIDDEN // HEADS // 2, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("named", ["file", "directory"])
def test_a_gguf_file_becomes_a_run(tmp_path: Path, named: str) -> None:
    model = small_llama()
    (tmp_path / "given").mkdir()
    write_gguf(model, tmp_path / "given" / "small.gguf")
    path = tmp_path / "given" / "small.gguf" if named == "file" else tmp_path / "given"
    count = import_model(path, tmp_path / "run", overrides=SMALL)
    assert count == sum(parameter.numel() for parameter in model.parameters())
    export_run(tmp_path / "run", tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"left_out": "blk.1.ffn_down"}, r"lacks tensors of the model: model\.layers\.1\.mlp\.down_proj\.weight"),
        ({"rope_factors": True}, r"tensors that transformers does not read: rope_freqs\.weight"),
    ],
)
def test_tensors_of_file_and_model_must_be_the_same(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    write_gguf(small_llama(), tmp_path / "small.gguf", **changes)
    with pytest.raises(InputError, match=expected):
        source.load_pretrained(source.find_source(tmp_path))


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(source, "GGUF_NEEDS", ("gguf", "no_such_library"))
    with pytest.raises(InputError, match=r"needs no_such_library; pip install 'skippipe\[gguf\]'"):
        import_model(tmp_path / "small.gguf", tmp_path / "run")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"small\.gguf: cannot be loaded"):
        import_model(tmp_path / "small.gguf", tmp_path / "run")


def test_of_several_files_one_must_be_named(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"2 \.gguf files; name one of them"):
        import_model(tmp_path, tmp_path / "run")
