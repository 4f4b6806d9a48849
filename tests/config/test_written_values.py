"""What values written in YAML mean: never another one than stands there, and every refusal names place and remedy."""

from pathlib import Path
from typing import Any

import pytest

from skippipe.config.experiment_file import load_experiment, save_experiment
from skippipe.errors import ConfigError

MINIMAL = "cluster: cluster.yaml\ndata: {source: python_stdlib}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(MINIMAL)
    return path


def value_of(file: Path, override: str) -> Any:
    value: Any = load_experiment(file, [override])
    for part in override.partition("=")[0].split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.max_steps=1e3", 1000),
        ("training.max_steps=1_000", 1000),
        ("seed=0x10", 16),
        ("seed=4294967295", 2**32 - 1),
        ("optimizer.lr=1e-3", 1e-3),
        ("optimizer.lr=.5", 0.5),
        ("optimizer.lr=1", 1.0),
        ("training.compile=yes", True),
        ("training.compile=TRUE", True),
        ("pipeline.uniform_coverage=off", False),
        ("optimizer.fused=auto", "auto"),
        ("optimizer.fused=no", False),
        ("name=2024", "2024"),
        ("name=yes", "yes"),
        ("name=010", "010"),
        ("name=1:30", "1:30"),
        ("name=2024-01-01", "2024-01-01"),
        ("name='null'", "null"),
        ("name=0b_", "0b_"),
        ("name='[x'", "[x"),
        ("run_dir=/runs/a[1", "/runs/a[1"),
        ("training.threads=null", None),
        ("pipeline.route_lengths={3: 1, 6: 2}", {3: 1, 6: 2}),
        ("model.options={rope_theta: 1e4, vocab_size: 32_000, flag: no}", None),
    ],
)
def test_values_are_what_they_say(file: Path, override: str, expected: Any) -> None:
    if expected is None and override.startswith("model"):
        assert value_of(file, override) == {"rope_theta": 1e4, "vocab_size": 32000, "flag": "no"}
    else:
        assert value_of(file, override) == expected
        assert type(value_of(file, override)) is type(expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.num_microbatches=yes", "training.num_microbatches: .*valid integer.*'yes'"),
        ("training.micro_batch_size=true", "training.micro_batch_size: .*valid integer.*True"),
        ("training.max_steps=10.5", "training.max_steps: .*valid integer"),
        ("training.max_steps='10'", "training.max_steps: .*valid integer.*'10'"),
        ("seed=010", "seed: .*valid integer; write 10, without quotes or leading zeros .*'010'"),
        ("seed=1:30", "seed: .*valid integer.*'1:30'"),
        ("seed=0b_", "seed: .*valid integer.*'0b_'"),
        ("seed=!!int x", "not valid YAML .*'x' is no whole number"),
        ("seed=!!float x", "not valid YAML .*'x' is no number"),
        ("seed=!!bool x", "not valid YAML .*'x' is neither true nor false"),
        ("seed=!!timestamp 2024-01-01", "could not determine a constructor"),
        ("seed=4294967296", "seed: .*less than or equal to 4294967295"),
        ("pipeline.planner.seed=4294967296", "pipeline.planner.seed: .*4294967295"),
        ("seed=" + "9" * 5000, r"9999999999\.\.\. \(5000 digits\) is beyond 9223372036854775807"),
        ("training.max_steps=1e300", "training.max_steps: .*valid integer"),
        ("training.num_microbatches=1000000000000", "less than or equal to 100000"),
        ("name=a\nb", r"holds a line break or control character; leave '\\n' out"),
        ('name="a\\x00b"', r"holds a line break or control character; leave '\\x00' out"),
        ('name="a\\eb"', r"leave '\\x1b' out"),
        ('name="\\ud800"', r"not valid YAML|leave '\\ud800' out"),
        ("name=../x", "would put the run outside of runs/; give a plain name, and run_dir"),
        ("name=/x", "outside of runs/"),
        ("name=a/../../x", "outside of runs/"),
        ("name=.", "outside of runs/"),
        ("name=", "name: .*valid string"),
        ("name=1.5", "name: .*valid string.*1.5"),
        ("data.tokenizer=bpe:²", "tokenizer 'bpe:²': expected bpe:SIZE"),
        ("data.tokenizer=bpe:" + "9" * 5000, "expected bpe:SIZE, such as bpe:4096"),
        ("training.threads=1000000000000", "less than or equal to 4096"),
        ("comm.timeout_s=1e300", "less than or equal to 1000000"),
        ("=3", r"expected key\.sub=value"),
        ("a..b=3", r"expected key\.sub=value"),
        ("seed=[", "not valid YAML"),
        ("training.max_stepz=3", "unknown key 'training.max_stepz'; did you mean 'training.max_steps'"),
        ("training=5", "training: "),
        ("run_dir=$NOT_SET_ANYWHERE/x", "the variable NOT_SET_ANYWHERE is not set"),
        ("name=${nowhere}", "nowhere"),
        ("name=${name}", "name"),
        ("optimizer.fused=maybe", r"optimizer\.fused: Input should be a valid boolean or 'auto'"),
        (
            "pipeline.stage_sizes=[2, 0]",
            r"pipeline\.stage_sizes\.1: Input should be greater than or equal to 1 \(got 0\)",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_and_an_override_is_blamed(file: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        load_experiment(file, ["optimizer.lr=1e-3", override])
    message = str(caught.value)
    if "${" not in override and not override.startswith("run_dir"):
        assert message.startswith(f"override {override!r}: ")
    assert message.isprintable()


def test_the_file_is_blamed_for_what_stands_there(file: Path) -> None:
    file.write_text(MINIMAL + "training: {max_stepz: 3}\n")
    with pytest.raises(ConfigError, match=r"experiment\.yaml: unknown key 'training\.max_stepz'"):
        load_experiment(file, ["training.max_steps=3"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &x [1, 2]\nb: *x\n", "unknown key"),
        ("a: &x [*x]\n", "an alias leads to itself"),
        ("\n".join(["a0: &a0 [1]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]), "more"),
        ("a: " + "[" * 5000, "nested too deeply|not valid YAML"),
        ("? [a]\n: 1\n", "not valid YAML"),
        ("base: [a]\n", "expected the name of a file"),
        ("base: experiment.yaml\0", "not valid YAML"),
        ("<<: {seed: 1}\nseed: 2\n", "cluster: Field required"),
        ('"a\\nb": 1\n', "control character"),
        ("1: 2\n", "unknown key '1'"),
        ("null: 2\n", "only text, numbers|unknown key|null|None"),
    ],
)
def test_files_that_are_no_experiment(file: Path, text: str, expected: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load_experiment(file)


@pytest.mark.parametrize(
    "name", ["1e3", "yes", "010", "0x10", "null", "~", "1:30", "a: b", ".5", "-", "a b", "é", "1_0"]
)
def test_texts_survive_being_written(file: Path, name: str) -> None:
    experiment = load_experiment(file).model_copy(update={"name": name})
    save_experiment(experiment, file)
    assert load_experiment(file).name == name
