"""Without a network, what needs the hub says so within seconds, and what does not need it works."""

import socket
import time
from collections.abc import Iterator
from contextlib import closing

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
