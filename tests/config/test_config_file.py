"""Experiments: reading, overriding, and what a user's mistakes look like."""

from pathlib import Path

import pytest

from skippipe.config.experiment import Experiment
from skippipe.config.experiment_file import load_experiment, save_experiment
from skippipe.config.key_names import known_keys
from skippipe.errors import ConfigError, SkipPipeError

MINIMAL = """
cluster: cluster.yaml
data: {source: python_stdlib}
training: {max_steps: 10}
"""


@pytest.fixture
def experiment_file(tmp_path: Path) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(MINIMAL)
    return path


def test_minimal_experiment_has_defaults_and_anchors_paths(experiment_file: Path) -> None:
    experiment = load_experiment(experiment_file)
    assert experiment.training.max_steps == 10
    assert experiment.training.num_microbatches == 12
    assert experiment.cluster == str(experiment_file.parent / "cluster.yaml")


def test_overrides_win_over_the_file(experiment_file: Path) -> None:
    experiment = load_experiment(experiment_file, ["training.max_steps=3", "optimizer.lr=1e-3", "name=x"])
    assert (experiment.training.max_steps, experiment.optimizer.lr, experiment.name) == (3, 1e-3, "x")


def test_base_file_is_merged_below(experiment_file: Path) -> None:
    child = experiment_file.with_name("child.yaml")
    child.write_text("base: experiment.yaml\nname: child\ntraining: {micro_batch_size: 2}\n")
    experiment = load_experiment(child)
    assert experiment.name == "child"
    assert (experiment.training.max_steps, experiment.training.micro_batch_size) == (10, 2)


def test_written_experiment_reads_back_equal(experiment_file: Path, tmp_path: Path) -> None:
    experiment = load_experiment(experiment_file)
    save_experiment(experiment, tmp_path / "out" / "experiment.yaml")
    assert load_experiment(tmp_path / "out" / "experiment.yaml") == experiment


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainng.max_steps=3", "did you mean 'training"),
        ("training.max_step=3", "did you mean 'training.max_steps'"),
        ("max_steps=3", "did you mean 'training.max_steps'"),
        ("training.seed=5", "did you mean 'seed'"),
        ("training.max_steps=many", "training.max_steps"),
        ("training.max_steps=0", "greater than or equal to 1"),
        ("pipeline.skip_ratio=1.5", "less than 1"),
        ("pipeline.skip_ratio=nan", "pipeline.skip_ratio"),
        ("training=5", "training"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("logging.wandb.mode=sometimes", "logging.wandb.mode"),
        ("training.dtype=float16", "training.dtype"),
    ],
)
def test_mistakes_name_the_key_and_the_remedy(experiment_file: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(experiment_file, [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_one_text_in_place_of_overrides_is_refused(experiment_file: Path) -> None:
    with pytest.raises(SkipPipeError, match=r"overrides: 'training.max_steps=3' is one text"):
        load_experiment(experiment_file, "training.max_steps=3")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1\n", "not valid YAML"),
        ("- 1\n- 2\n", "expected keys and values"),
        ("seed: 1\nseed: 2\n", "uplicate"),
        ("cluster: c.yaml\n", "data"),
        ("base: missing.yaml\n", "no such file"),
        ("base: experiment.yaml\n", "circle"),
        ("cluster: ${nowhere}\ndata: {source: python_stdlib}\n", "nowhere"),
        ("cluster: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load_experiment(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: no such file"):
        load_experiment(tmp_path / "nothing.yaml")


def test_override_without_value_is_refused(experiment_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected key\.sub=value"):
        load_experiment(experiment_file, ["training.max_steps"])


def test_known_keys_reach_every_depth() -> None:
    keys = set(known_keys(Experiment))
    assert {"training.max_steps", "logging.wandb.mode", "pipeline.planner.seed", "data.source"} <= keys
