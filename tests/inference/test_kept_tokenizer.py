"""A run keeps its tokenizer: what becomes of the corpus and of the tokenizer's own files does not matter to it."""

import json
import shutil
from pathlib import Path

import library_tokenizers
import pytest
from training_runs import make_experiment, small_plan, train_alone
from transformers import AutoTokenizer

from skippipe.cli.main import main
from skippipe.config.experiment import Experiment
from skippipe.data.kept_tokenizer import kept_tokenizer

PROMPT = "line 7 of text"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def trained(folder: Path, tokenizer: str) -> Experiment:
    data = {"tokenizer": str(folder / tokenizer) if tokenizer == "library" else tokenizer}
    training = {"max_steps": 1}
    experiment = make_experiment(folder, data=data, training=training, evaluation={"interval": 0})
    train_alone(experiment, small_plan())
    return experiment


def generated(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> list[int]:
    capsys.readouterr()
    arguments = ["generate", str(run_dir), "--prompt", PROMPT, "--max-new-tokens", "4", "--device", "cpu", "--json"]
    assert run(*arguments) == 0
    tokens: list[int] = json.loads(capsys.readouterr().out)["tokens"]
    return tokens


@pytest.mark.parametrize("tokenizer", ["bpe:300", "library"])
def test_corpus_and_tokenizer_may_go(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    if tokenizer == "library":
        library_tokenizers.byte_level(tmp_path / "library", bos=True)
    experiment = trained(tmp_path, tokenizer)
    ours = kept_tokenizer(experiment.data, tmp_path / "run")
    before = generated(tmp_path / "run", capsys)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    for gone in ("text", "cache", "library"):
        shutil.rmtree(tmp_path / gone, ignore_errors=True)
    assert generated(tmp_path / "moved", capsys) == before
    assert run("export", str(tmp_path / "moved"), str(tmp_path / "model")) == 0
    library = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert ours is not None
    assert library(PROMPT, add_special_tokens=False)["input_ids"] == ours.encode(PROMPT).tolist()
    (tmp_path / "other.txt").write_text("line 3 has many words\n" * 40)
    evaluated = ["evaluate", str(tmp_path / "moved"), "--text", str(tmp_path / "other.txt"), "--device", "cpu"]
    assert run(*evaluated, "--policy", "full", "--batches", "1", "--out", str(tmp_path / "evaluated.json")) == 0


def test_a_tokenizer_is_not_trained_again_under_old_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = trained(tmp_path, "bpe:300")
    run_dir = tmp_path / "run"
    before = generated(run_dir, capsys)
    kept = (run_dir / "tokenizer" / "tokenizer.json").read_text()
    (tmp_path / "text" / "0.txt").write_text("zebra quokka xylophone " * 500)
    assert generated(run_dir, capsys) == before
    evaluated = ["evaluate", str(run_dir), "--policy", "full", "--batches", "1", "--device", "cpu"]
    assert run(*evaluated, "--out", str(tmp_path / "evaluated.json")) == 0  # of the new text, by the run's tokens
    caches = [json.loads(path.read_text())["model"] for path in (tmp_path / "cache").glob("*/tokenizer.json")]
    assert caches == [json.loads(kept)["model"]] * 2
    shutil.rmtree(run_dir / "tokenizer")  # as versions before 0.3 left it
    capsys.readouterr()
    assert run("export", str(run_dir), str(tmp_path / "model")) == 2
    assert "corpus is not the one that run and tokenizer (bpe:300) were trained on" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "text")
    make_experiment(tmp_path)  # writes the text again
    assert kept_tokenizer(experiment.data, run_dir) is None
    assert generated(run_dir, capsys) == before


def test_a_prompt_that_is_no_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, "bytes")
    assert not (tmp_path / "run" / "tokenizer").exists()
    assert run("generate", str(tmp_path / "run"), "--prompt", "a\udcff", "--device", "cpu") == 2
    assert "prompt: character 2 is '\\udcff', which has no UTF-8" in capsys.readouterr().err
