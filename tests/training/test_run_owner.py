"""Two starts in one run directory: the second is turned away while the first lives, and takes over when it does not."""

import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch._C._distributed_c10d import HashStore
from training_runs import ALONE, make_experiment, small_plan, train_alone

from skippipe.checkpoint.disks.run_disks import named_disk
from skippipe.errors import InputError, StorageError
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.training import run_owner
from skippipe.training.loop import open_trainer
from skippipe.training.run_owner import OWNER_FILE, Owner, owned_run_directory, read_owner
from skippipe.training.signals import StopSignal


@pytest.fixture(autouse=True)
def short_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_owner, "WATCH_S", 0.3)
    monkeypatch.setattr(run_owner, "LOOK_S", 0.02)
    monkeypatch.setattr(run_owner, "BEAT_S", 0.05)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """Another process of this machine."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def left_by(folder: Path, **changes: Any) -> Owner:
    """Write the owner's file of another start, as it would be of this process but for `changes`."""
    owner = Owner.here().model_copy(update=changes)
    folder.mkdir(exist_ok=True)
    (folder / OWNER_FILE).write_text(owner.model_dump_json())
    return owner


def of_process(number: int, **changes: Any) -> dict[str, Any]:
    return {"process": number, "started_s": psutil.Process(number).create_time(), **changes}


def test_one_that_ends_leaves_the_marks_of_the_next_start(tmp_path: Path) -> None:
    with owned_run_directory(tmp_path / "run", ALONE):
        first = named_disk(tmp_path / "run", "of-the-next")
    assert named_disk(tmp_path / "run", "of-the-next") == first


def test_directory_is_owned_while_entered_and_an_empty_one_removed(tmp_path: Path) -> None:
    with owned_run_directory(tmp_path / "run", ALONE):
        owner = read_owner(tmp_path / "run")
        assert owner is not None
        assert (owner.process, owner.host) == (os.getpid(), platform.node())
    assert not (tmp_path / "run").exists()


def test_living_owner_of_this_machine_is_named(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    owner = left_by(tmp_path, **of_process(sleeper.pid))
    before = (tmp_path / OWNER_FILE).read_bytes()
    message = rf"in use by process {sleeper.pid} on {owner.host}, since 20.* UTC; wait until it has ended"
    with pytest.raises(InputError, match=message), owned_run_directory(tmp_path, ALONE):
        pass
    assert (tmp_path / OWNER_FILE).read_bytes() == before


def test_second_start_neither_plans_nor_writes(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    left_by(tmp_path / "run", **of_process(sleeper.pid))
    with pytest.raises(InputError, match="in use by"):
        train_alone(make_experiment(tmp_path))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {OWNER_FILE}


@pytest.mark.parametrize("kind", ["ended", "number used again", "before a restart of the machine"])
def test_dead_owner_is_taken_over(tmp_path: Path, sleeper: subprocess.Popen[bytes], kind: str) -> None:
    changes = of_process(sleeper.pid)
    if kind == "ended":
        sleeper.kill()  # and nobody has waited for it: it is a zombie
        while Owner.here().model_copy(update=changes).alive:
            pass
    elif kind == "number used again":
        changes["started_s"] -= 1000
    else:
        changes["machine"] = "an earlier boot"
    left_by(tmp_path, **changes)
    with owned_run_directory(tmp_path, ALONE):
        owner = read_owner(tmp_path)
        assert owner is not None
        assert owner.process == os.getpid()
    assert not (tmp_path / OWNER_FILE).exists()


def test_owner_on_another_machine_lives_while_it_touches_its_file(tmp_path: Path) -> None:
    left_by(tmp_path, machine="another", host="elsewhere")
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.02):
            os.utime(tmp_path / OWNER_FILE)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(InputError, match=r"in use by process .* on elsewhere"), owned_run_directory(tmp_path, ALONE):
        pass
    ended.set()
    thread.join()
    with owned_run_directory(tmp_path, ALONE):
        owner = read_owner(tmp_path)
        assert owner is not None
        assert owner.host == platform.node()


@pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"{}", b'{"process": 1e400}'])
def test_damaged_file_of_an_owner_is_taken_over_after_a_while(tmp_path: Path, content: bytes) -> None:
    (tmp_path / OWNER_FILE).write_bytes(content)
    with owned_run_directory(tmp_path, ALONE):
        assert read_owner(tmp_path) is not None


def test_start_within_a_start_owns_it_already(tmp_path: Path) -> None:
    with owned_run_directory(tmp_path, ALONE):
        with owned_run_directory(tmp_path, ALONE) as inner:
            inner.check()
        assert read_owner(tmp_path) is not None


def test_owner_that_was_taken_for_dead_ends_at_its_next_save(tmp_path: Path) -> None:
    with open_trainer(make_experiment(tmp_path), small_plan(), ALONE) as trainer, StopSignal() as stop:
        trainer.one_step(stop)
        other = left_by(tmp_path / "run", nonce="other", host="elsewhere")
        with pytest.raises(StorageError, match=r"taken over by process .* on elsewhere"):
            trainer.run(stop)
    assert read_owner(tmp_path / "run") == other
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_file_removed_by_hand_comes_back(tmp_path: Path) -> None:
    with owned_run_directory(tmp_path, ALONE) as owner:
        (tmp_path / OWNER_FILE).unlink()
        owner.check()
        assert read_owner(tmp_path) is not None


def test_only_the_first_of_several_ranks_owns_and_all_are_turned_away(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    left_by(tmp_path, **of_process(sleeper.pid))
    store = HashStore()

    def start(rank: int) -> Exception | None:
        try:
            with owned_run_directory(tmp_path, DistributedContext(rank, 2, 0, 10.0, store)):
                return None
        except InputError as reason:
            return reason

    with ThreadPoolExecutor(2) as ranks:
        first, second = ranks.map(start, range(2))
    assert "in use by" in str(first)
    assert "rank 0: " in str(second)
