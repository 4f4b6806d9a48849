"""Weights & Biases: wandb's own environment variables count, and nobody is asked for a key."""

import http.server
import io
import logging
import os
import sys
from pathlib import Path
from threading import Thread

import pytest
from processes import ForkedProcess, preloaded, redirect
from training_runs import make_experiment

from skippipe.config.experiment import WandbOptions
from skippipe.errors import ConfigError
from skippipe.monitor.metrics import Metric
from skippipe.monitor.wandb_file import recorded_steps
from skippipe.monitor.wandb_place import WandbPlace
from skippipe.monitor.wandb_run import WandbRun

RUN = Path("runs/tiny")


@pytest.mark.parametrize(
    ("options", "environment", "said"),
    [
        ({}, {}, "Weights & Biases offline, project skippipe, files in runs/tiny/wandb"),
        (
            {},
            {"WANDB_MODE": "online", "WANDB_PROJECT": "mine", "WANDB_DIR": "/logs"},
            "Weights & Biases online, project mine, files in /logs/wandb "
            "(by WANDB_MODE, WANDB_PROJECT, WANDB_DIR of the environment)",
        ),
        (
            {"mode": "online"},
            {"WANDB_MODE": "dryrun"},
            "offline, project skippipe, files in runs/tiny/wandb (by WANDB_MODE",
        ),
        (
            {"mode": "online"},
            {"WANDB_MODE": "disabled"},
            "Weights & Biases disabled (by WANDB_MODE of the environment)",
        ),
        ({"mode": "disabled"}, {"WANDB_MODE": "online", "WANDB_PROJECT": "mine"}, "Weights & Biases disabled"),
        ({"project": "own"}, {"WANDB_PROJECT": "mine"}, "Weights & Biases offline, project own, files"),
    ],
)
def test_the_environment_has_a_say(options: dict[str, str], environment: dict[str, str], said: str) -> None:
    assert said in str(WandbPlace.of(WandbOptions.model_validate(options), RUN, environment))


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="WANDB_MODE must be online, offline or disabled, not 'on'"):
        WandbPlace.of(WandbOptions(), RUN, {"WANDB_MODE": "on"})


class Terminal(io.StringIO):
    """A terminal at which nobody sits."""

    def isatty(self) -> bool:
        """Say so."""
        return True

    def readline(self, size: int | None = -1, /) -> str:  # type: ignore[override]  # typeshed: as StringIO has it
        """Fail where a test would wait for ever."""
        raise AssertionError("somebody was asked")


@pytest.mark.usefixtures("own_wandb")
def test_online_without_a_key_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for name, value in {"HOME": tmp_path, "NETRC": tmp_path / "netrc", "WANDB_BASE_URL": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("stdin", "stderr"):
        monkeypatch.setattr(sys, name, Terminal())
    experiment = make_experiment(tmp_path, logging={"wandb": {"mode": "online"}})
    with caplog.at_level(logging.WARNING):
        WandbRun(experiment, tmp_path, "some-id").close()
    assert "wandb: cannot go online" in caplog.text
    assert list((tmp_path / "wandb").glob("offline-run-*"))


class Refusing(http.server.BaseHTTPRequestHandler):
    """Knows no key."""

    def do_POST(self) -> None:
        """Say so to whatever is asked."""
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.send_error(401)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


KEY = "0123456789" * 4


def record_at_a_server_that_refuses(folder: Path) -> None:
    """Record one step, with all that is said in a file."""
    import wandb

    redirect(folder / "output.txt")
    logging.basicConfig(level=logging.DEBUG, force=True)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        os.environ |= {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": KEY}
        recording = WandbRun(make_experiment(folder, logging={"wandb": {"mode": "online"}}), folder, "some-id")
        recording.write({Metric.STEP: 1, Metric.TRAIN_LOSS: 2.5})
        recording.close()
        wandb.teardown()  # a process of multiprocessing does not wait for it at its end
        server.shutdown()


def test_online_at_a_server_that_refuses_the_key_records_offline(tmp_path: Path) -> None:
    process = preloaded().Process(target=record_at_a_server_that_refuses, args=(tmp_path,))
    process.start()
    code, output = ForkedProcess(process, tmp_path / "output.txt").finish(60)
    assert code == 0, output
    assert "wandb: cannot go online" in output
    assert "cannot start" not in output
    assert recorded_steps(tmp_path / "wandb", "some-id") == {1}
    assert KEY not in output
