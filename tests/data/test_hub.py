"""Without a network, what needs the hub says so within seconds, and what does not need it works."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from skippipe.config.data_options import DataOptions
from skippipe.config.experiment import Experiment
from skippipe.data.hub import hub_problem, problem_of
from skippipe.data.rows import row_texts
from skippipe.data.tokenizer import build_tokenizer
from skippipe.errors import DataError
from skippipe.model.architecture import experiment_model

CLOSED = "http://127.0.0.1:9"
"""Nobody listens there, so a connection is refused at once."""


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the hub where nobody listens."""
    monkeypatch.setattr(constants, "ENDPOINT", CLOSED)
    hub_problem.cache_clear()
    yield
    hub_problem.cache_clear()


def test_a_server_that_never_answers_is_given_up() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        start_s = time.monotonic()
        problem = problem_of(f"http://127.0.0.1:{silent.getsockname()[1]}", limit_s=0.2)
        assert time.monotonic() - start_s < 2
    assert problem is not None
    assert "cannot be reached" in problem


@pytest.mark.usefixtures("no_hub")
def test_a_tokenizer_of_the_hub_is_refused_at_once() -> None:
    start_s = time.monotonic()
    with pytest.raises(DataError, match=f"'NOBODY/nothing' cannot be loaded .*{CLOSED} cannot be reached"):
        build_tokenizer(DataOptions(source="python_stdlib", tokenizer="NOBODY/nothing"), ())
    assert time.monotonic() - start_s < 5


@pytest.mark.usefixtures("no_hub")
def test_a_dataset_of_the_hub_is_refused_at_once() -> None:
    start_s = time.monotonic()
    with pytest.raises(DataError, match=f"NOBODY/nothing cannot be read .{CLOSED} cannot be reached"):
        next(row_texts(DataOptions(source="huggingface", dataset="NOBODY/nothing")))
    assert time.monotonic() - start_s < 5


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(("split", "reason"), [("train", "JSON"), ("validation", "Bad split: validation")])
def test_what_is_wrong_with_a_local_dataset_is_said_without_a_network(tmp_path: Path, split: str, reason: str) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\nno JSON\n')
    with pytest.raises(DataError, match=f"cannot be read .*{reason}") as error:
        list(row_texts(DataOptions(source="huggingface", dataset=str(tmp_path), split=split)))
    assert CLOSED not in str(error.value)


def test_the_hub_is_asked_for_the_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *values: object) -> None:
            """Say nothing."""

        def do_HEAD(self) -> None:
            self.do_GET()

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        hub_problem.cache_clear()
        with pytest.raises(DataError, match="NOBODY/nothing cannot be read"):
            next(row_texts(DataOptions(source="huggingface", dataset="NOBODY/nothing", revision="a1b2c3")))
        server.shutdown()
    hub_problem.cache_clear()
    assert any("NOBODY/nothing" in path and "a1b2c3" in path for path in asked), asked


@pytest.mark.usefixtures("no_hub")
def test_a_model_whose_vocabulary_is_given_needs_no_tokenizer() -> None:
    options = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    experiment = Experiment.model_validate(
        {
            "name": "offline",
            "cluster": "cluster.yaml",
            "model": {"options": options | {"num_key_value_heads": 2, "vocab_size": 1_000}},
            "data": {"source": "python_stdlib", "tokenizer": "NOBODY/nothing"},
        }
    )
    assert experiment_model(experiment).vocab_size == 1_000
