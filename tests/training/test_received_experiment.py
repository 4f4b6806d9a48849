"""The experiment of another host on one that has none of its files, and which node that one is."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore
from training_runs import CLUSTER, MODEL_OPTIONS, make_experiment

from skippipe.config.data_options import DataOptions
from skippipe.data.corpus_files import is_here
from skippipe.data.kept_tokenizer import FOLDER, kept_tokenizer, packed_tokenizer, unpack_tokenizer
from skippipe.data.tokenizer import build_tokenizer, save_for_transformers
from skippipe.errors import ConfigError, DataError
from skippipe.membership.addresses import Place
from skippipe.model.architecture import build_config, experiment_model
from skippipe.training.joining.invitation import free_rank
from skippipe.training.joining.received_experiment import received_experiment
from skippipe.training.recovery.run_facts import ToldExperiment

TRAINED = DataOptions(source="python_stdlib", tokenizer="bpe:300")


def told(folder: Path, **changes: Any) -> ToldExperiment:
    """Return what a host whose files are in `folder` tells of its experiment; then the files are gone."""
    folder.mkdir()
    experiment = make_experiment(folder, **changes)
    found = ToldExperiment.of(experiment)
    folder.rename(folder.with_name("gone"))
    return ToldExperiment.model_validate_json(found.model_dump_json())


def tokenizer_of(text: str) -> bytes:
    """Return a tokenizer that was trained on a text, packed."""
    folder = Path(FOLDER)
    folder.mkdir()
    save_for_transformers(TRAINED, build_tokenizer(TRAINED, [[text * 20]]), folder)
    content = packed_tokenizer(TRAINED, Path())
    folder.rename("packed")
    return content


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, which is returned."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_a_host_with_an_empty_folder_gets_all_that_its_node_needs(tmp_path: Path, here: Path) -> None:
    folder = tmp_path / "there"
    build_config("llama", MODEL_OPTIONS | {"vocab_size": 300}).save_pretrained(folder / "model")
    architecture = {"directory": str(folder / "model"), "options": {}}
    experiment = make_experiment(folder, model=architecture, data={"tokenizer": str(folder / "tokens")})
    found = ToldExperiment.of(experiment)
    folder.rename(tmp_path / "gone")
    received = received_experiment(found, tokenizer_of("many words"), ["training.threads=2"])
    assert received.run_path == Path("runs/run")
    assert Path(received.cluster).read_text() == CLUSTER
    assert received.data.cache_dir is None
    assert Path(received.data.tokenizer) == here / "runs/run/tokenizer"
    assert experiment_model(received).vocab_size == 300
    assert received.training.threads == 2
    assert not is_here(received.data)


def test_what_is_here_as_it_was_told_stays(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path)
    experiment.run_path.mkdir()
    received = received_experiment(ToldExperiment.of(experiment), b"", [])
    assert received == experiment
    assert is_here(received.data)
    changed = ToldExperiment.of(experiment).model_copy(update={"cluster": "another"})
    assert received_experiment(changed, b"", []).cluster == str(experiment.run_path / "cluster.yaml")


@pytest.mark.parametrize("run_dir", ["../outside", "runs/../../outside", "/not/here"])
def test_nothing_that_is_told_leads_out_of_the_working_folder(tmp_path: Path, run_dir: str) -> None:
    found = told(tmp_path / "there", run_dir=run_dir)
    assert received_experiment(found, b"", []).run_path == Path("runs/run")
    given = received_experiment(found, b"", ["run_dir=elsewhere"])
    assert given.run_path == Path("elsewhere")


def test_a_wrong_override_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"override 'training\.thread=2': unknown key"):
        received_experiment(told(tmp_path / "there"), b"", ["training.thread=2"])


def test_a_tokenizer_comes_as_it_was(here: Path) -> None:
    content = tokenizer_of("a few words")
    unpack_tokenizer(content, here / "run", anew=True)
    tokenizer = kept_tokenizer(TRAINED, here / "run")
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("a few words")) == "a few words"
    assert {path.name: path.read_bytes() for path in (here / "run" / FOLDER).iterdir()} == {
        path.name: path.read_bytes() for path in (here / "packed").iterdir()
    }
    unpack_tokenizer(b"", here / "run", anew=True)
    assert (here / "run" / FOLDER).is_dir()
    assert packed_tokenizer(DataOptions(source="python_stdlib"), here) == b""


@pytest.mark.parametrize("name", ["../outside.json", "/outside.json", "below/tokenizer.json", ".hidden"])
def test_an_archive_with_other_names_is_refused(here: Path, name: str) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr(name, "{}")
    with pytest.raises(DataError, match="no folder of plain files"):
        unpack_tokenizer(archive.getvalue(), here / "run", anew=True)
    assert [*os.walk(here)][-1][2] == []
    with pytest.raises(DataError, match="damaged"):
        unpack_tokenizer(b"PK" + archive.getvalue()[8:40], here / "run", anew=True)


def test_an_archive_that_would_fill_the_disk_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skippipe.data.kept_tokenizer.MOST_BYTES", 1000)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as writer:
        writer.writestr("tokenizer.json", "0" * 1001)
    with pytest.raises(DataError, match="no folder of plain files"):
        unpack_tokenizer(archive.getvalue(), here / "run", anew=True)


def test_text_is_here_or_can_be_had(tmp_path: Path) -> None:
    assert is_here(DataOptions(source="python_stdlib"))
    assert is_here(DataOptions(source="huggingface", dataset="owner/name"))
    assert not is_here(DataOptions(source="huggingface", dataset=str(tmp_path / "none")))
    assert not is_here(DataOptions(source="text", paths=(str(tmp_path / "none"),)))


def test_processes_without_a_launcher_have_a_node_each() -> None:
    store, nodes = HashStore(), ("a", "b", "c", "d")
    assert [free_rank(store, nodes, node) for node in (None, "c", None)] == [1, 2, 3]
    assert free_rank(store, nodes, "b") == 1  # it was started again
    for node, problem in ((None, "all 4 nodes have a process"), ("a", "brings the experiment"), ("e", "no node 'e'")):
        with pytest.raises(ConfigError, match=problem):
            free_rank(store, nodes, node)


def test_an_address_has_host_and_port() -> None:
    assert Place.of("host.example:40000") == Place("host.example", 40000)
    assert Place.of("[fe80::1]:1") == Place("fe80::1", 1)
    assert [Place.of(text) for text in ("host", "host:", ":1", "runs/x:y", "host:70000")] == [None] * 5
