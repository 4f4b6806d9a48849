"""Weights that are not all there, too many, quantised or of two minds about the head."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pretrained_models import SHORT, logits_of, write_experiment, write_pretrained
from safetensors.torch import load_file, save_file
from torch import Tensor

from skippipe.checkpoint.huggingface.export import export_run
from skippipe.checkpoint.huggingface.import_model import import_model
from skippipe.checkpoint.huggingface.source import find_source, is_tied, load_pretrained
from skippipe.checkpoint.huggingface.stored_tensors import check_not_quantised, stored_types
from skippipe.errors import InputError

Tensors = dict[str, Tensor]
DOWN = "model.layers.3.mlp.down_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
IDS = torch.arange(16).reshape(1, 16)


def change(folder: Path, edit: Callable[[Tensors], object], **settings: object) -> None:
    """Change the tensors in a folder, and its config.json."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


@pytest.mark.parametrize(
    ("architecture", "edit", "settings", "expected"),
    [
        ("llama", lambda tensors: tensors.pop(DOWN), {}, f"the file lacks tensors of the model: {DOWN}"),
        ("llama", lambda tensors: tensors.pop(HEAD), {}, f"the file lacks tensors of the model: {HEAD}"),
        ("llama", lambda tensors: None, {"num_hidden_layers": 3}, rf"that the model does not: {DOWN[:14]}.*and 1 more"),
        ("llama", lambda tensors: tensors.update(odd=torch.ones(1)), {}, "that the model does not: odd"),
        ("llama", lambda tensors: tensors.update({DOWN: torch.ones(2, 3)}), {}, rf"{DOWN} \(2, 3\) instead of"),
        ("gpt_neox", lambda tensors: tensors.pop("embed_out.weight"), {}, f"lacks tensors of the model: {HEAD}"),
    ],
)
def test_tensors_of_file_and_model_must_be_the_same(
    tmp_path: Path, architecture: str, edit: Callable[[Tensors], object], settings: dict[str, object], expected: str
) -> None:
    write_pretrained(tmp_path / "given", architecture, tie_word_embeddings=False)
    change(tmp_path / "given", edit, **settings)
    with pytest.raises(InputError, match=expected):
        import_model(tmp_path / "given", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_expert_that_is_missing_is_refused(tmp_path: Path) -> None:
    write_pretrained(tmp_path / "given", "mixtral")
    experts = "model.layers.1.block_sparse_moe.experts"
    change(tmp_path / "given", lambda tensors: tensors.pop(f"{experts}.2.w1.weight"))
    with pytest.raises(InputError, match=r"lacks tensors of the model: layers\.1\..*\.experts\.2\.w1\.weight"):
        load_pretrained(find_source(tmp_path / "given"))


def test_experts_do_not_close_ranks(tmp_path: Path) -> None:
    write_pretrained(tmp_path / "given", "mixtral")

    def drop_the_third(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts.2." in name]:
            del tensors[name]

    change(tmp_path / "given", drop_the_third, num_local_experts=3)
    with pytest.raises(InputError, match=r"lacks .*experts\.2\.w1.*; the file has tensors .*experts\.3\.w1"):
        load_pretrained(find_source(tmp_path / "given"))


def test_causal_masks_of_older_files_follow_from_the_configuration(tmp_path: Path) -> None:
    write_pretrained(tmp_path / "given", "gpt2")
    mask = torch.ones(1, 1, 8, 8).tril()
    change(tmp_path / "given", lambda tensors: tensors.update({"transformer.h.0.attn.bias": mask.bool()}))
    load_pretrained(find_source(tmp_path / "given"))


def test_a_head_of_its_own_is_used_though_the_configuration_says_tied(tmp_path: Path) -> None:
    given, out = tmp_path / "given", tmp_path / "out"
    write_pretrained(given, tie_word_embeddings=False)
    change(given, lambda tensors: None, tie_word_embeddings=True)
    import_model(given, tmp_path / "run", config_path=write_experiment(tmp_path), overrides=SHORT)
    export_run(tmp_path / "run", out)
    assert torch.equal(logits_of(out, IDS), logits_of(given, IDS))
    assert not json.loads((out / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("stored", [{EMBEDDING}, {HEAD}, {EMBEDDING, HEAD}])
def test_a_head_equal_to_the_embedding_is_tied(tmp_path: Path, stored: set[str]) -> None:
    model = write_pretrained(tmp_path / "given", tie_word_embeddings=True)
    weight = model.lm_head.weight.detach()

    def keep(tensors: Tensors) -> None:
        del tensors[EMBEDDING]
        tensors.update({name: weight.clone() for name in stored})

    change(tmp_path / "given", keep)
    again = load_pretrained(find_source(tmp_path / "given"))
    assert is_tied(again)
    assert again.config.tie_word_embeddings
    assert torch.equal(again.lm_head.weight, weight)


@pytest.mark.parametrize(
    ("norms", "others", "said", "expected"),
    [
        (torch.float32, torch.float32, "bfloat16", torch.float32),
        (torch.float32, torch.bfloat16, None, torch.float32),
        (torch.float16, torch.bfloat16, "float16", torch.float32),
        (torch.bfloat16, torch.bfloat16, "float32", torch.bfloat16),
        (torch.float64, torch.float16, None, torch.float64),
    ],
)
def test_no_stored_number_is_rounded(
    tmp_path: Path, norms: torch.dtype, others: torch.dtype, said: str | None, expected: torch.dtype
) -> None:
    write_pretrained(tmp_path / "given")

    def convert(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(norms if "norm" in name else others)
        # Of older files: no part of the model, so its dtype does not count.
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4, dtype=torch.float64)

    change(tmp_path / "given", convert, dtype=said)
    model = load_pretrained(find_source(tmp_path / "given"))
    stored = load_file(tmp_path / "given" / "model.safetensors")
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name].to(expected)), name


@pytest.mark.parametrize(
    ("names", "settings", "expected"),
    [
        ((), {"quantization_config": {"quant_method": "gptq", "bits": 4}}, '"quant_method": "gptq"'),
        (("layers.0.q_proj.qweight",), {}, "GPTQ or AWQ"),
        (("layers.0.q_proj.SCB",), {}, "bitsandbytes, 8 bit"),
        (("layers.0.q_proj.weight.quant_state.bitsandbytes__nf4",), {}, "bitsandbytes, 4 bit"),
        (("layers.0.q_proj.weight_packed",), {}, "compressed-tensors"),
        (("layers.0.q_proj.weight_scale_inv",), {}, "FP8 with scales"),
        (("experts.gate_up_proj_blocks",), {}, "MXFP4"),
        (("layers.0.q_proj.q_weight",), {}, "EXL2"),
        (("layers.0.q_proj.scales",), {}, "MLX"),
    ],
)
def test_a_quantisation_is_named(
    tmp_path: Path, names: tuple[str, ...], settings: dict[str, object], expected: str
) -> None:
    write_safetensors(tmp_path, {name: torch.ones(2) for name in names}, **settings)
    with pytest.raises(InputError, match="the weights are quantised") as error:
        check_not_quantised(tmp_path)
    assert expected in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32])
def test_numbers_of_another_type_are_quantised(tmp_path: Path, dtype: torch.dtype) -> None:
    write_safetensors(tmp_path, {"model.norm.weight": torch.ones(2).to(dtype)})
    with pytest.raises(InputError, match=r"'model\.norm\.weight' is stored as \w+ \((8-bit floats|integers)\)"):
        check_not_quantised(tmp_path)


def write_safetensors(folder: Path, tensors: Tensors, **settings: object) -> None:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))


def test_shards_that_do_not_fit_their_index(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    with pytest.raises(InputError, match=r"neither model\.safetensors nor"):
        stored_types(tmp_path)
    index.write_text("{}")
    with pytest.raises(InputError, match="it has no weight_map"):
        stored_types(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    save_file({"a": torch.ones(1)}, tmp_path / "1.safetensors")
    with pytest.raises(InputError, match=r"it names '2\.safetensors'"):
        stored_types(tmp_path)
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "2.safetensors")
    with pytest.raises(InputError, match=r"2\.safetensors: a: another file"):
        stored_types(tmp_path)


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path, {})
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="merge it into them"):
        find_source(tmp_path)
