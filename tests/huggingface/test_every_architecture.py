"""Every architecture comes in and goes out as transformers itself writes it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from pretrained_models import SHORT, logits_of, write_experiment, write_pretrained
from safetensors.torch import load_file
from torch import Tensor

from skippipe.checkpoint.huggingface.export import export_run
from skippipe.checkpoint.huggingface.import_model import import_model
from skippipe.checkpoint.huggingface.loss_check import check_same_loss
from skippipe.checkpoint.huggingface.source import find_source, load_pretrained
from skippipe.checkpoint.huggingface.stored_tensors import INDEX_FILE
from skippipe.checkpoint.huggingface.weight_shards import WeightShards
from skippipe.cli.main import skippipe
from skippipe.errors import InputError
from skippipe.model.architecture import config_from_directory
from skippipe.model.architecture_traits import ARCHITECTURES

RENAMED_TIED = {"gpt_neox", "mixtral"}
"""Of those whose names in memory are not those in the file, tied heads are tried as well."""
CASES = [
    *((name, index % 2 == 1) for index, name in enumerate(ARCHITECTURES)),
    *((name, ARCHITECTURES.index(name) % 2 == 0) for name in sorted(RENAMED_TIED)),
]
CONFIGURATION = ("config.json", "generation_config.json")


def files_in(folder: Path) -> dict[str, object]:
    """Return the weights' files byte for byte, and the content of the configuration."""
    weights: dict[str, object] = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    settings = [path for path in folder.glob("*.json") if path.name in (*CONFIGURATION, INDEX_FILE)]
    return weights | {path.name: json.loads(path.read_text()) for path in settings}


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(("architecture", "tied"), CASES)
def test_files_are_those_of_save_pretrained(tmp_path: Path, architecture: str, tied: bool) -> None:
    given, out = tmp_path / "given", tmp_path / "out"
    write_pretrained(given, architecture, tie_word_embeddings=tied)
    import_model(given, tmp_path / "run", config_path=write_experiment(tmp_path), overrides=SHORT)
    export_run(tmp_path / "run", out)
    assert files_in(out) == files_in(given)
    ids = torch.arange(24).reshape(2, 12)
    assert torch.equal(logits_of(out, ids), logits_of(given, ids))


def test_a_large_export_has_the_shards_of_save_pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_pretrained(tmp_path / "given", "llama")
    import_model(tmp_path / "given", tmp_path / "run", config_path=write_experiment(tmp_path), overrides=SHORT)
    shutil.rmtree(tmp_path / "given")
    model.save_pretrained(tmp_path / "given", max_shard_size="40KB")
    monkeypatch.setattr(WeightShards.__init__, "__defaults__", ("40KB",))
    export_run(tmp_path / "run", tmp_path / "out")
    assert len(files_in(tmp_path / "given")) > 5
    assert files_in(tmp_path / "out") == files_in(tmp_path / "given")


def test_experts_are_written_apart_after_training_too(tmp_path: Path) -> None:
    write_pretrained(tmp_path / "given", "qwen3_moe")
    import_model(tmp_path / "given", tmp_path / "run", config_path=write_experiment(tmp_path), overrides=SHORT)
    trained = CliRunner().invoke(skippipe, ["train", "--config", str(tmp_path / "run" / "config.yaml")])
    assert trained.exit_code == 0, trained.output
    export_run(tmp_path / "run", tmp_path / "out", dtype="bfloat16")
    expected, found = tensors_in(tmp_path / "given"), tensors_in(tmp_path / "out")
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert not torch.equal(found["lm_head.weight"], expected["lm_head.weight"].bfloat16())


def test_another_loss_than_in_transformers_is_refused(tmp_path: Path) -> None:
    write_pretrained(tmp_path / "given")
    model = load_pretrained(find_source(tmp_path / "given"))
    config = config_from_directory(tmp_path / "given")
    check_same_loss(config, model, tmp_path)
    config.rms_norm_eps = 1.0
    with pytest.raises(InputError, match="in transformers; it cannot be trained here as it is configured"):
        check_same_loss(config, model, tmp_path)
