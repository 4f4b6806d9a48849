"""Evaluation of a run that was really trained, against a computation of its own with the plain model."""

import json
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from training_runs import make_experiment, small_plan, train_alone
from transformers import LlamaForCausalLM

from skippipe.cli.main import main
from skippipe.data.cache import open_cache
from skippipe.data.samples import SampleOrder
from skippipe.errors import SkipPipeError
from skippipe.inference.evaluation import evaluate_run
from skippipe.planning import experiment_model
from skippipe.training.checkpoint import latest_checkpoint

BATCHES = 3


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    train_alone(make_experiment(folder), small_plan())
    return folder / "run"


def plain_losses(run_dir: Path, stages: Sequence[int]) -> list[float]:
    """Return the loss of each batch in a Hugging Face model whose layer list holds only the layers of `stages`."""
    experiment = make_experiment(run_dir.parent)
    model = LlamaForCausalLM(experiment_model(experiment))
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None
    weights: dict[str, Tensor] = {}
    for file in checkpoint.glob("model*.safetensors"):
        weights |= load_file(file)
    model.load_state_dict(weights, strict=True)
    layers = [small_plan().stages[stage].layers for stage in stages]
    model.model.layers = nn.ModuleList(model.model.layers[index] for span in layers for index in range(*span))
    order = SampleOrder(open_cache(experiment.data, experiment.seed), seed=experiment.seed, sequence_length=16)
    losses = []
    for index in range(BATCHES):
        input_ids, labels = order.validation_batch(index, experiment.training.micro_batch_size)
        with torch.no_grad():
            logits = model(input_ids=input_ids, use_cache=False).logits  # (B, T, V)
        losses.append(float(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())))
    return losses


def test_full_depth_is_the_plain_model(run_dir: Path) -> None:
    result = evaluate_run(run_dir, policy_name="full", keeps=[1.0], num_batches=BATCHES).results[0]
    expected = math.exp(sum(plain_losses(run_dir, [0, 1, 2])) / BATCHES)
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert (result.kept_stages, result.share_computed, result.perplexity_std) == (3, 1.0, 0.0)


def test_random_stages_average_over_what_each_batch_drew(run_dir: Path) -> None:
    evaluation = evaluate_run(run_dir, policy_name="random", keeps=[0.67], num_batches=BATCHES, repeats=40)
    result = evaluation.results[0]
    possible = [plain_losses(run_dir, (0, *others)) for others in combinations((1, 2), 1)]
    lowest, highest = (sum(best(column) for column in zip(*possible, strict=True)) / BATCHES for best in (min, max))
    assert lowest < math.log(result.perplexity) < highest
    expected = sum(sum(losses) for losses in possible) / (len(possible) * BATCHES)
    assert math.log(result.perplexity) == pytest.approx(expected, abs=0.25 * (highest - lowest))
    assert result.share_computed == pytest.approx(2 / 3)
    assert result.samples == 40 * BATCHES
    assert json.loads((run_dir / "evaluation.json").read_text())["results"][0]["perplexity"] == result.perplexity


def test_same_seed_same_numbers(run_dir: Path) -> None:
    first, again, other = (
        evaluate_run(run_dir, policy_name="random", keeps=[0.67], num_batches=BATCHES, repeats=2, seed=seed).results
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_command_prints_one_json_object(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(run_dir), "--batches", "2", "--json", "--keep", "1.0", "0.67"])
    assert not stop.value.code
    printed = json.loads(capsys.readouterr().out)
    assert [row["kept_stages"] for row in printed["results"]] == [3, 2]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--keep", "0.1"], "the smallest share is 0.33"),
        (["--keep", "1.5"], "expected a share above 0"),
        (["--policy", "best"], "'best'"),
        (["--device", "toaster"], "'toaster' is not one of"),
    ],
)
def test_mistakes(run_dir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(run_dir), *arguments])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert expected in message
    assert "Traceback" not in message


def test_truncated_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_alone(make_experiment(tmp_path, training={"max_steps": 1}), small_plan())
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    damaged = next(iter(checkpoint.glob("model*.safetensors")))
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(tmp_path / "run")])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert damaged.name in message
    assert "Traceback" not in message


def test_run_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SkipPipeError, match="not a run directory"):
        evaluate_run(tmp_path, policy_name="full", keeps=[1.0])
