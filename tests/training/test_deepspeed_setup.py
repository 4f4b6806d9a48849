"""DeepSpeed that is missing, old or without a compiler: said before training starts, with what to do."""

import logging
import multiprocessing
import os
import re
import sys
from importlib.metadata import PackageNotFoundError
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from torch.distributed import destroy_process_group
from torch.utils.cpp_extension import _get_build_directory
from training_runs import ALONE, losses, make_experiment, small_plan, train_alone

from skippipe.checkpoint.reader import checkpoint_path
from skippipe.errors import ConfigError
from skippipe.model.architecture import experiment_model
from skippipe.runtime.runner_factory import make_runner
from skippipe.training.optimizer import AdamW, deepspeed_setup, make_optimizer
from skippipe.training.optimizer.deepspeed_setup import (
    OPERATOR,
    build_operator,
    check_version,
    prepare,
    remove_abandoned,
)

OPERATOR_FILE = Path(_get_build_directory(OPERATOR, False)) / f"{OPERATOR}.so"


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def empty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on the PATH; compiled operators of this machine are out of sight."""
    import deepspeed  # noqa: F401  # it runs programs of its own when it is imported

    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.delenv("CXX", raising=False)
    return folder


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(deepspeed_setup, "version", missing)
    with pytest.raises(ConfigError, match=r"deepspeed_zero1 needs DeepSpeed, .* pip install 'skippipe\[deepspeed\]'"):
        check_version("deepspeed_zero1")


def test_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_setup, "version", lambda name: "0.17.6+cpu")
    with pytest.raises(ConfigError, match=r"needs DeepSpeed 0\.19\.7 or newer, found 0\.17\.6\+cpu"):
        check_version("deepspeed_zero2")


@pytest.mark.parametrize(("there", "missing"), [((), r"c\+\+"), (("c++",), "ninja")])
def test_no_compiler(empty_path: Path, there: tuple[str, ...], missing: str) -> None:
    for name in there:
        program(empty_path / name, "exit 0")
    with pytest.raises(ConfigError, match=rf"optimizer\.offload: .*{missing} is not on the PATH; .*offload=false"):
        build_operator()


def test_a_compilation_that_fails(empty_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, because torch remembers what was tried."""
    folders = [str(empty_path), str(Path(sys.executable).parent), "/usr/bin", "/bin"]
    monkeypatch.setenv("PATH", os.pathsep.join(folders))
    program(empty_path / "c++", "echo 'no space left' >&2; exit 1")
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=send_failure, args=(sender,))
    process.start()
    assert receiver.poll(60)
    assert re.search(r"cpu_adam cannot be compiled in .*extensions.*; `ds_report` shows", receiver.recv())
    process.join()


def send_failure(sender: Connection) -> None:
    try:
        build_operator()
    except ConfigError as error:
        sender.send(str(error))


def test_only_an_abandoned_lock_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock = tmp_path / "lock"
    with lock.open("w"):
        remove_abandoned(lock)
        assert lock.exists()
    remove_abandoned(lock)
    assert not lock.exists()
    assert "left by a compilation that was killed" in caplog.text
    remove_abandoned(lock)


def test_offload_without_deepspeed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="offload is done by DeepSpeed, backend is replicated; use deepspeed_zero1"):
        make_experiment(tmp_path, optimizer={"offload": True})


def test_other_backends_need_no_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_setup, "check_version", lambda backend: pytest.fail("it was looked for"))
    assert prepare(make_experiment(tmp_path)) == 0


def test_one_replica_trains_with_plain_adamw_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    experiment = make_experiment(tmp_path, optimizer={"backend": "deepspeed_zero1"})
    runner = make_runner(experiment, small_plan(), experiment_model(experiment), ALONE)
    with caplog.at_level(logging.INFO):
        assert isinstance(make_optimizer(experiment, runner), AdamW)
    assert "deepspeed_zero1 has nothing to share out here: one replica" in caplog.text


@pytest.mark.skipif(not OPERATOR_FILE.exists(), reason="DeepSpeed's cpu_adam was never compiled here; it takes minutes")
def test_one_process_offloads(tmp_path: Path) -> None:
    train_alone(make_experiment(tmp_path, "plain"))
    offload = {"optimizer": {"backend": "deepspeed_zero2", "offload": True}}
    train_alone(make_experiment(tmp_path, "offloaded", **offload))
    assert losses(tmp_path / "offloaded") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)
    half_way = {"resume": str(checkpoint_path(tmp_path / "offloaded", 4))}
    for name, sections in {"plain-again": {}, "offloaded-again": offload}.items():
        summary = train_alone(make_experiment(tmp_path, name, checkpoint=half_way, **sections))
        assert summary.loss == pytest.approx(losses(tmp_path / "plain")[-1], abs=1e-5)
    destroy_process_group()
