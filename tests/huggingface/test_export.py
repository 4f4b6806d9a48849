"""Exported checkpoints, loaded by transformers alone."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import make_experiment, small_plan, train_alone
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from skippipe.checkpoint.huggingface.export import export_run
from skippipe.checkpoint.model_tensors import load_parameters
from skippipe.checkpoint.reader import latest_checkpoint
from skippipe.cli.main import main
from skippipe.data.token_cache import open_cache
from skippipe.model.architecture import experiment_model
from skippipe.model.device import choose_device
from skippipe.model.stage import build_stage


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    train_alone(make_experiment(folder), small_plan())
    return folder / "run"


def export(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["export", *arguments])
    return int(stop.value.code or 0)


def logits_of_run(run_dir: Path, input_ids: torch.Tensor) -> torch.Tensor:
    """Return what our own stages say (B, T, V)."""
    experiment = make_experiment(run_dir.parent)
    config, plan = experiment_model(experiment), small_plan()
    device, dtype = choose_device("cpu"), torch.float32
    stages = [
        build_stage(config, *stage.layers, with_embedding_and_head=index == 0, seed=9, device=device, dtype=dtype)
        for index, stage in enumerate(plan.stages)
    ]
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None
    load_parameters(checkpoint, config, stages)
    hidden = stages[0].embed(input_ids)
    for stage in stages:
        hidden = stage(hidden)
    return stages[0].logits(hidden)


@torch.no_grad()
def test_transformers_loads_it_with_equal_logits(run_dir: Path, tmp_path: Path) -> None:
    assert export(str(run_dir), str(tmp_path / "model")) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    input_ids = torch.arange(32).reshape(2, 16) % 250  # (B, T)
    assert torch.equal(model(input_ids=input_ids).logits, logits_of_run(run_dir, input_ids))
    assert [path.name for path in (tmp_path / "model").glob("*.safetensors*")] == ["model.safetensors"]


def test_tokenizer_and_end_of_text_come_along(run_dir: Path, tmp_path: Path) -> None:
    export(str(run_dir), str(tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    experiment = make_experiment(run_dir.parent)
    ours = open_cache(experiment.data, experiment.seed).tokenizer
    text = "Übung macht\n den Meister <|endoftext|>"
    assert (
        tokenizer.encode(text.removesuffix("<|endoftext|>")) == ours.encode(text.removesuffix("<|endoftext|>")).tolist()
    )
    assert tokenizer.eos_token_id == ours.eos_id
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.generation_config.eos_token_id == ours.eos_id
    tokens = model.generate(torch.tensor([[65, 66]]), max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] > 2


def test_an_older_step_in_another_dtype(run_dir: Path, tmp_path: Path) -> None:
    export(str(run_dir), str(tmp_path / "old"), "--step", "2", "--dtype", "bfloat16")
    export(str(run_dir), str(tmp_path / "new"))
    old = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert {parameter.dtype for parameter in old.parameters()} == {torch.bfloat16}
    assert not torch.equal(old.lm_head.weight, new.lm_head.weight.bfloat16())


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    options = make_experiment(tmp_path).model.options | {"tie_word_embeddings": True}
    train_alone(make_experiment(tmp_path, model={"options": options}), small_plan())
    export(str(tmp_path / "run"), str(tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")


def test_a_tokenizer_that_the_library_reads_otherwise_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train_alone(make_experiment(tmp_path, model={"architecture": "qwen2"}), small_plan())
    with caplog.at_level(logging.WARNING):
        export_run(tmp_path / "run", tmp_path / "model")
    assert f"{tmp_path / 'model'}: AutoTokenizer reads its tokenizer as Qwen2Tokenizer" in caplog.text
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    text = "cafe\u0301"  # the library's class would make one letter of the last two
    assert tokenizer.encode(text) == list(text.encode())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{run}", "{run}"], "exists and is not empty"),
        (
            ["{run}", "{new}", "--step", "5"],
            "no such checkpoint directory; {run}/checkpoints has step-0000000",
        ),
        (["{new}", "{run}"], "not a run directory"),
    ],
)
def test_mistakes(
    run_dir: Path, tmp_path: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [part.format(run=run_dir, new=tmp_path / "new") for part in arguments]
    assert export(*filled) == 2
    error = capsys.readouterr().err
    assert expected.format(run=run_dir) in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_leaves_nothing(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = run_dir / "checkpoints" / "step-00000004"
    file = checkpoint / "model-stage-1.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        assert export(str(run_dir), str(tmp_path / "model"), "--step", "4") == 2
    finally:
        file.write_bytes(content)
    assert "model-stage-1.safetensors: its content is not what was saved" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
