"""Where paths lead: from the file that names them, from anywhere, after a move, with `~` and variables."""

import shutil
from pathlib import Path

import pytest

from skippipe.cli.main import main
from skippipe.config.data_options import DataOptions
from skippipe.config.experiment_file import load_experiment, load_run, save_experiment
from skippipe.data.sources import documents

CONTENT = """
name: case
cluster: clusters/one.yaml
data: {source: text, paths: [corpus.txt, more/*.txt], tokenizer: ./tokenizer, cache_dir: cache}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An experiment in a folder whose name is a pattern."""
    folder = tmp_path / "a[1] b"
    (folder / "more").mkdir(parents=True)
    (folder / "experiment.yaml").write_text(CONTENT)
    (folder / "corpus.txt").write_text("one")
    (folder / "more" / "x[2].txt").write_text("two")
    return folder / "experiment.yaml"


def texts(options: DataOptions) -> list[str]:
    return sorted(document.text for document in documents(options))


def test_paths_start_at_the_file_wherever_the_start_is(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = load_experiment(file)
    assert experiment.cluster == str(file.parent / "clusters" / "one.yaml")
    assert experiment.data.tokenizer == str(file.parent / "tokenizer")
    assert experiment.data.cache_dir == str(tmp_path / "cache")
    assert experiment.run_path == Path("runs/case")
    assert texts(experiment.data) == ["one", "two"]


def test_brackets_in_a_path_are_taken_as_they_are(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert texts(load_experiment(file, ["data.paths=['more/x[2].txt']"]).data) == ["two"]
    assert texts(load_experiment(file, [f"data.paths=['{file.parent}/more']"]).data) == ["two"]


def test_corpus_that_lies_in_the_working_directory_is_still_found_and_said(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.txt").write_text("three")
    file.write_text(CONTENT.replace("corpus.txt, more/*.txt", "here.txt"))
    assert texts(load_experiment(file).data) == ["three"]
    assert "here.txt is in the working directory, not beside the file that names it" in caplog.text


def test_names_of_the_hub_stay_names(file: Path) -> None:
    assert load_experiment(file, ["data.tokenizer=org/model"]).data.tokenizer == "org/model"
    assert load_experiment(file, ["data.tokenizer=bpe:400"]).data.tokenizer == "bpe:400"


def test_urls_of_text_stay_urls(file: Path, tmp_path: Path) -> None:
    experiment = load_experiment(file, ["data.paths=['s3://bucket/x/*.txt','https://host/a.txt?key=1']"])
    assert experiment.data.paths == ("s3://bucket/x/*.txt", "https://host/a.txt?key=1")
    save_experiment(experiment, tmp_path / "runs" / "case" / "config.yaml")
    assert load_run(tmp_path / "runs" / "case").data.paths == experiment.data.paths


def test_home_and_variables_are_replaced(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/someone")
    monkeypatch.setenv("SCRATCH", "/scratch")
    overrides = ["run_dir=~/run", "cluster=$SCRATCH/c.yaml", "data.paths=['${SCRATCH}/*.txt']", "data.cache_dir=~/c"]
    experiment = load_experiment(file, [*overrides, "checkpoint.resume=~/run/checkpoints/step-00000001"])
    assert experiment.run_path == Path("/someone/run")
    assert experiment.cluster == "/scratch/c.yaml"
    assert experiment.data.paths == ("/scratch/*.txt",)
    assert experiment.data.cache_dir == "/someone/c"
    assert experiment.checkpoint.resume == "/someone/run/checkpoints/step-00000001"


def test_run_directory_can_be_moved(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "case"
    (run / "model").mkdir(parents=True)
    overrides = [f"model.directory={run}/model", f"data.tokenizer={run}/model", f"cluster={run}/cluster.yaml"]
    experiment = load_experiment(file, overrides)
    save_experiment(experiment, run / "config.yaml")
    assert load_run(Path("runs/case")) == experiment.model_copy(update={"run_dir": "runs/case"})
    moved = tmp_path / "elsewhere"
    shutil.move(run, moved)
    again = load_run(moved)
    assert again.model.directory == again.data.tokenizer == str(moved / "model")
    assert again.cluster == str(moved / "cluster.yaml")
    assert again.run_path == moved
    assert again.data.paths == experiment.data.paths


def test_config_of_a_run_is_about_the_run_that_it_lies_in(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any working directory, and after the run was moved or copied."""
    monkeypatch.chdir(tmp_path)
    save_experiment(load_experiment(file), tmp_path / "runs" / "case" / "config.yaml")
    shutil.copytree(tmp_path / "runs" / "case", tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    assert load_experiment(tmp_path / "copy" / "config.yaml").run_path == tmp_path / "copy"
    assert load_experiment("config.yaml").run_path.resolve() == tmp_path / "copy"
    assert load_experiment(tmp_path / "runs" / "case" / "config.yaml").run_path == tmp_path / "runs" / "case"
    assert load_experiment("config.yaml", ["run_dir=other"]).run_path == Path("other")
    shutil.copy("config.yaml", "mine.yaml")
    assert load_experiment("mine.yaml").run_dir == load_experiment(file).run_dir


def test_home_on_the_command_line(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(file.parent))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config=~/experiment.yaml", "--print-config"])
    assert stop.value.code == 0
    assert "name: case" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config=$NOWHERE/experiment.yaml", "--print-config"])
    assert stop.value.code == 2
    assert "the variable NOWHERE is not set" in capsys.readouterr().err
