"""Pretrained models made into runs: evaluated, trained on, and exported again."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from pretrained_models import write_pretrained
from torch.nn.functional import cross_entropy
from training_runs import losses, make_experiment
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from skippipe.checkpoint.huggingface.export import export_run
from skippipe.checkpoint.huggingface.import_model import import_model
from skippipe.checkpoint.reader import check_model, complete_checkpoints, read_metadata, require_checkpoint
from skippipe.cli.main import skippipe
from skippipe.config.experiment_file import load_experiment, load_run, save_experiment
from skippipe.data.samples import SampleOrder
from skippipe.data.token_cache import open_cache
from skippipe.data.tokenizer import ByteTokenizer, save_for_transformers
from skippipe.errors import InputError, SkipPipeError
from skippipe.model.architecture import experiment_model

SMALL = (
    "training.sequence_length=16",
    "training.micro_batch_size=2",
    "training.max_steps=3",
    "data.max_bytes=200_000",
    "pipeline.planner.max_evaluations=300",
)


def write_model(folder: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Write a small model as transformers does, in several shards, with a byte tokenizer."""
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=ByteTokenizer.vocab_size,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size="40KB")
    save_for_transformers(make_experiment(folder.parent).data, ByteTokenizer(), folder)
    return model


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(skippipe, [str(argument) for argument in arguments])


def test_weights_come_in_and_go_out_unchanged(tmp_path: Path) -> None:
    model = write_model(tmp_path / "given")
    result = call("import", tmp_path / "given", tmp_path / "run", *SMALL)
    assert result.exit_code == 0, result.output
    assert "imported to" in result.output
    assert call("export", tmp_path / "run", tmp_path / "out").exit_code == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_the_run_begins_at_the_weights(tmp_path: Path) -> None:
    model = write_model(tmp_path / "given")
    call("import", tmp_path / "given", tmp_path / "run", *SMALL)
    result = call("evaluate", tmp_path / "run", "--policy", "full", "--keep", "1.0", "--batches", "2", "--json")
    experiment = load_experiment(tmp_path / "run" / "config.yaml")
    order = SampleOrder(open_cache(experiment.data, experiment.seed), seed=experiment.seed, sequence_length=16)
    batches = [order.validation_batch(index, 2) for index in range(2)]
    with torch.no_grad():
        plain = [cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten()) for ids, labels in batches]
    perplexity = json.loads(result.output)["results"][0]["perplexity"]
    assert perplexity == pytest.approx(float(torch.stack(plain).mean().exp()), rel=1e-5)


def test_training_goes_on_under_the_same_directory(tmp_path: Path) -> None:
    write_model(tmp_path / "given")
    call("import", tmp_path / "given", tmp_path / "run", *SMALL)
    plan = (tmp_path / "run" / "plan.json").read_bytes()
    trained = call("train", "--config", tmp_path / "run" / "config.yaml", "logging.wandb.mode=disabled")
    assert trained.exit_code == 0, trained.output
    assert len(losses(tmp_path / "run")) == 3
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == ["step-00000000", "step-00000003"]
    assert (tmp_path / "run" / "plan.json").read_bytes() == plan


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_goes_on_from_the_weights_in_the_dtype_of_the_run(tmp_path: Path, dtype: str) -> None:
    model = write_model(tmp_path / "given")
    # With no learning rate to speak of, the weights after a step are those that came in.
    frozen = (f"training.dtype={dtype}", "optimizer.lr=1e-12", "training.max_steps=1", "logging.wandb.mode=disabled")
    call("import", tmp_path / "given", tmp_path / "run", *SMALL, *frozen)
    assert call("train", "--config", tmp_path / "run" / "config.yaml").exit_code == 0
    assert call("export", tmp_path / "run", tmp_path / "out").exit_code == 0
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        expected = tensor.to(getattr(torch, dtype))
        assert torch.allclose(after.state_dict()[name], expected, atol=1e-9), name


def test_an_experiment_is_given(tmp_path: Path) -> None:
    write_model(tmp_path / "given")
    experiment = make_experiment(tmp_path)
    save_experiment(experiment, tmp_path / "mine.yaml")
    assert call("import", tmp_path / "given", tmp_path / "run", "--config", tmp_path / "mine.yaml").exit_code == 0
    imported = load_experiment(tmp_path / "run" / "config.yaml")
    assert imported.cluster == experiment.cluster
    assert imported.training == experiment.training
    assert imported.model.directory == imported.data.tokenizer == str((tmp_path / "run" / "model").resolve())
    metadata = read_metadata(require_checkpoint(tmp_path / "run"))
    assert (metadata.step, metadata.tokens) == (0, 0)
    assert len(metadata.files) == 3


def test_a_stored_dtype_is_kept(tmp_path: Path) -> None:
    write_model(tmp_path / "given", torch.bfloat16)
    import_model(tmp_path / "given", tmp_path / "run", overrides=SMALL)
    assert read_metadata(require_checkpoint(tmp_path / "run")).dtype == "bfloat16"


def test_dropout_of_an_imported_model_is_off_and_stays_in_what_is_exported(tmp_path: Path) -> None:
    write_pretrained(tmp_path / "given", "gpt2", resid_pdrop=0.1, embd_pdrop=0.2, attn_pdrop=0.3)
    import_model(tmp_path / "given", tmp_path / "run", overrides=SMALL)
    config = experiment_model(load_run(tmp_path / "run"))
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.0, 0.0, 0.0)
    export_run(tmp_path / "run", tmp_path / "out")
    given, out = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("given", "out"))
    assert out == given
    checkpoint = require_checkpoint(tmp_path / "run")
    # A checkpoint that was trained with dropout is of the same model.
    check_model(checkpoint, read_metadata(checkpoint), AutoConfig.from_pretrained(tmp_path / "run" / "model"))


def test_an_experiment_that_is_not_given_fits_small_models(tmp_path: Path) -> None:
    write_pretrained(tmp_path / "given", num_hidden_layers=2, max_position_embeddings=64)
    planner = ("pipeline.planner.max_evaluations=20",)
    import_model(str(tmp_path / "given"), str(tmp_path / "run"), overrides=planner)
    experiment = load_run(str(tmp_path / "run"))
    assert (experiment.pipeline.num_stages, experiment.pipeline.skip_ratio) == (2, 0)
    assert experiment.training.sequence_length == 64
    for name in ("run", "given"):
        result = call("evaluate", tmp_path / name, "--policy", "full", "--keep", "1.0", "--batches", "1", "--json")
        assert result.exit_code == 0, result.output


def test_mistakes(tmp_path: Path) -> None:
    write_model(tmp_path / "given")
    (tmp_path / "empty").mkdir()
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "config.json").write_text(json.dumps({"model_type": "gemma3n"}))
    (tmp_path / "shared" / "model.safetensors").write_bytes(b"no tensors")
    expected = {
        "nothing": "no such directory or .gguf file",
        "empty": "neither config.json nor a .gguf file",
        "shared": "cannot be loaded",
    }
    for name, message in expected.items():
        with pytest.raises(SkipPipeError, match=message):
            import_model(tmp_path / name, tmp_path / "run")
        assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="exists and is not empty"):
        import_model(tmp_path / "given", tmp_path / "given")
    with pytest.raises(SkipPipeError, match="9 stages need at least 9 layers"):
        import_model(tmp_path / "given", tmp_path / "run", overrides=("pipeline.num_stages=9",))
    assert not (tmp_path / "run").exists()
    for file in (tmp_path / "given").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(InputError, match=r"no \*\.safetensors beside config.json"):
        import_model(tmp_path / "given", tmp_path / "run")
