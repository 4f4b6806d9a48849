"""What options of the Python API refuse, before any work."""

from pathlib import Path
from typing import Any

import pytest
from training_runs import make_experiment, train_alone

from skippipe import FixedLayers, PerplexityOptions, TextOptions, evaluate, generate_texts, load_model
from skippipe.errors import InputError
from skippipe.inference.model_loading import LoadedModel


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    experiment = make_experiment(tmp_path_factory.mktemp("run"), training={"max_steps": 1}, evaluation={"interval": 0})
    train_alone(experiment)
    return load_model(experiment.run_path, device="cpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0; give at least 1"),
        ({"num_drafted": "many"}, "num_drafted: 'many'"),
        ({"num_drafted": 0}, "num_drafted: 0"),
        ({"calibration": "text.txt"}, "calibration: 'text.txt' is one text; give a list"),
    ],
)
def test_text_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        TextOptions(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_batches": 0}, "num_batches: 0; give at least 1"),
        ({"repeats": 0}, "repeats: 0; give at least 1"),
        ({"text": "text.txt"}, "text: 'text.txt' is one text"),
    ],
)
def test_perplexity_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        PerplexityOptions(**options)


@pytest.mark.parametrize("layers", [(), (0, -1)])
def test_fixed_layers(layers: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="give at least one, counted from 0"):
        FixedLayers(layers)


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ("import", TextOptions(), "prompts: 'import' is one text; give a list"),
        ([], TextOptions(), "prompts: there are none"),
        (["import"], TextOptions(keep=0.5), "--keep 0.5: --policy full runs every layer, whatever the share"),
    ],
)
def test_generation(model: LoadedModel, prompts: Any, options: TextOptions, words: str) -> None:
    with pytest.raises(InputError, match=words):
        generate_texts(model, prompts, options)


def test_evaluation(model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="policies: 'exit' is one text"):
        evaluate(model, policies="exit", keeps=[1.0])
    found = evaluate(model, policies=["full"], keeps=[1.0, 0.5], options=PerplexityOptions(num_batches=1))
    assert [(result.policy, result.keep) for result in found.results] == [("full", 1.0)]
