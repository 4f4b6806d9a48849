"""What a model's own files say of ends, positions, rotation and vocabulary, after an import and an export."""

import json
import logging
from pathlib import Path

import pytest
from pretrained_models import SHORT, write_experiment, write_pretrained
from tokenizers import AddedToken
from transformers import AutoTokenizer

from skippipe.checkpoint.huggingface.export import export_run
from skippipe.checkpoint.huggingface.import_model import import_model
from skippipe.errors import ConfigError, InputError
from skippipe.inference.model_loading import load_model
from skippipe.inference.prompt_tokenizer import PromptTokenizer
from skippipe.inference.text_source import TextSource

END_OF_TEXT_ID = 256


def edit(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_every_end_of_text_survives_import_and_export(tmp_path: Path, file: str) -> None:
    given, run, out = tmp_path / "given", tmp_path / "run", tmp_path / "out"
    write_pretrained(given)
    edit(given / file, eos_token_id=[7, 9])
    import_model(given, run, config_path=write_experiment(tmp_path), overrides=SHORT)
    export_run(run, out)
    assert json.loads((out / file).read_text())["eos_token_id"] == [7, 9]
    for folder in (given, run, out):
        assert PromptTokenizer(load_model(folder, device="cpu")).end_ids == {7, 9, END_OF_TEXT_ID}


def test_an_end_of_text_that_is_no_token_is_refused(tmp_path: Path) -> None:
    write_pretrained(tmp_path / "given")
    model = load_model(tmp_path / "given", device="cpu")
    edit(tmp_path / "given" / "generation_config.json", eos_token_id=["</s>"])
    with pytest.raises(InputError, match=r"eos_token_id is \['</s>'\]; give a token id"):
        PromptTokenizer(model)


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path: Path) -> None:
    write_pretrained(tmp_path / "given", vocab_size=200)
    with pytest.raises(InputError, match=r"56 tokens for which the model has no row \(the first is 200, .*200 rows"):
        import_model(tmp_path / "given", tmp_path / "run")


def test_special_tokens_without_a_row_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pretrained(tmp_path / "given")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "given")
    tokenizer.add_tokens([AddedToken("<image>", special=True)], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "given")
    with caplog.at_level(logging.WARNING):
        import_model(tmp_path / "given", tmp_path / "run", config_path=write_experiment(tmp_path), overrides=SHORT)
    assert "no row for special tokens: <image>" in caplog.text


def test_learned_positions_are_as_many_as_a_sample_is_long(tmp_path: Path) -> None:
    write_pretrained(tmp_path / "given", "gpt2", n_positions=24)
    experiment = write_experiment(tmp_path)
    with pytest.raises(ConfigError, match=r"training\.sequence_length is 25, the model has 24 positions"):
        import_model(
            tmp_path / "given",
            tmp_path / "run",
            config_path=experiment,
            overrides=(*SHORT, "training.sequence_length=25"),
        )
    model = load_model(tmp_path / "given", device="cpu")
    with pytest.raises(ConfigError, match="--sequence-length is 25, the model has 24 positions"):
        TextSource(model, sequence_length=25)


def test_dynamic_rotation_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ConfigError, match="rope_type 'dynamic' turns keys by the longest text"):
        write_pretrained(tmp_path / "given", rope_parameters=rope)
    write_pretrained(tmp_path / "given")
    edit(tmp_path / "given" / "config.json", rope_scaling={"type": "dynamic", "factor": 2.0})
    with pytest.raises(ConfigError, match="rope_type 'dynamic' turns keys by the longest text"):
        import_model(tmp_path / "given", tmp_path / "run", config_path=write_experiment(tmp_path), overrides=SHORT)
